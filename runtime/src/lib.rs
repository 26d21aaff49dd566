//! The machine: an engine, guest memory, the chipset and how a guest is booted.
