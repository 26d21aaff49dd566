//! The ratios to QEMU as a bar chart.

use plotters::prelude::*;

use crate::report::Report;

const WIDTH: u32 = 900;
const ROW: u32 = 22;

/// Draws the chart as SVG: a bar for each program, on a logarithmic axis on which 1 is QEMU's speed.
pub fn draw(report: &Report) -> Result<String, String> {
    let bars: Vec<(&str, f64)> = report.rows.iter().filter_map(|row| Some((row.name.as_str(), row.to_qemu?))).collect();
    let most = bars.iter().fold(2.0, |most: f64, (_, ratio)| most.max(*ratio)) * 1.2;
    let least = bars.iter().fold(0.5, |least: f64, (_, ratio)| least.min(*ratio)) / 1.2;
    let mut svg = String::new();
    let height = ROW * bars.len() as u32 + 90;
    draw_into(SVGBackend::with_string(&mut svg, (WIDTH, height)), &bars, least, most).map_err(|e| e.to_string())?;
    Ok(svg)
}

fn draw_into(
    backend: SVGBackend<'_>,
    bars: &[(&str, f64)],
    least: f64,
    most: f64,
) -> Result<(), Box<dyn std::error::Error>> {
    let root = backend.into_drawing_area();
    root.fill(&WHITE)?;
    let rows = bars.len() as i32;
    let mut chart = ChartBuilder::on(&root)
        .caption("Speed of the compiler, QEMU's TCG = 1", ("sans-serif", 18))
        .margin(10)
        .x_label_area_size(30)
        .y_label_area_size(120)
        .build_cartesian_2d((least..most).log_scale(), (0..rows).into_segmented())?;
    let name = |at: &SegmentValue<i32>| match at {
        SegmentValue::CenterOf(row) => bars.get((rows - 1 - row) as usize).map_or("", |bar| bar.0).to_owned(),
        _ => String::new(),
    };
    chart.configure_mesh().disable_y_mesh().y_labels(bars.len()).y_label_formatter(&name).draw()?;
    chart.draw_series(bars.iter().zip((0..rows).rev()).map(|((_, ratio), row)| {
        let colour = if *ratio >= 1.0 { RGBColor(38, 120, 178) } else { RGBColor(200, 60, 40) };
        let ends = [(1.0, SegmentValue::Exact(row)), (*ratio, SegmentValue::Exact(row + 1))];
        let mut bar = Rectangle::new(ends, colour.filled());
        bar.set_margin(4, 4, 0, 0);
        bar
    }))?;
    root.present()?;
    Ok(())
}
