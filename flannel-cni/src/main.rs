//! The flannel CNI plugin.

fn main() {}
