//! Jobs reach a worker and results the vCPU, whatever the threads' speed.

use diglot_model::jit::handover::Handover;
use loom::sync::Arc;
use loom::thread::{self, JoinHandle};

use crate::Others::{self, One, Two};
use crate::explore;

type Way = Arc<Handover<u32, u32>>;

/// Workers that answer `n` by `n + 100`.
fn start(workers: Others, room: usize) -> (Way, Vec<JoinHandle<()>>) {
    let way = Arc::new(Handover::new(room));
    let worker = |_| {
        let way = Arc::clone(&way);
        thread::spawn(move || way.serve(|n| n + 100))
    };
    let threads = (0..workers.count()).map(worker).collect();
    (way, threads)
}

fn finish(way: &Way, threads: Vec<JoinHandle<()>>) {
    way.close();
    threads.into_iter().for_each(|t| t.join().expect("a worker that ends"));
}

/// What a dispatch loop does between two blocks.
fn look(way: &Way, results: &mut Vec<u32>) {
    if way.has_done() {
        results.extend(way.take_done());
    }
}

#[test]
fn every_job_is_done_once() {
    for workers in [One, Two] {
        explore("every job is done once", workers, 50, move || {
            let (way, threads) = start(workers, 2);
            let mut results = Vec::new();
            assert!(way.request(1));
            look(&way, &mut results);
            assert!(way.request(2));
            look(&way, &mut results);
            way.wait_for(2 - results.len());
            look(&way, &mut results);
            results.sort();
            assert_eq!(results, [101, 102]);
            finish(&way, threads);
            assert!(!way.has_done());
        });
    }
}

/// What is ready when the vCPU looks, or becomes so while it takes others, is not forgotten.
#[test]
fn no_result_waits_unseen() {
    explore("no result waits unseen", Two, 50, || {
        let (way, threads) = start(Two, 2);
        let mut results = Vec::new();
        assert!(way.request(1) && way.request(2));
        look(&way, &mut results);
        finish(&way, threads);
        look(&way, &mut results);
        assert!(!way.has_done());
        assert!(way.take_done().is_empty());
    });
}

#[test]
fn a_full_queue_refuses() {
    explore("a full queue refuses", One, 10, || {
        let (way, threads) = start(One, 1);
        let mut accepted = vec![1];
        assert!(way.request(1));
        if way.request(2) {
            accepted.push(2);
        }
        let mut results = Vec::new();
        way.wait_for(accepted.len());
        look(&way, &mut results);
        assert_eq!(results, accepted.iter().map(|n| n + 100).collect::<Vec<_>>());
        finish(&way, threads);
    });
}

#[test]
fn workers_end_with_jobs_still_queued() {
    explore("workers end with jobs still queued", Two, 50, || {
        let (way, threads) = start(Two, 4);
        assert!(way.request(1) && way.request(2) && way.request(3));
        finish(&way, threads);
        assert!(way.take_done().len() <= 3);
    });
}
