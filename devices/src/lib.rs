//! The PC's devices: ports, MMIO and interrupt lines, nothing of CPUs.
