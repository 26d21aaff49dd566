//! The engine interface, and KVM behind it.
