//! The flannel CNI plugin.

use std::process::ExitCode;

fn main() -> ExitCode {
    flannel_cni::main()
}
