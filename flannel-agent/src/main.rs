//! The node agent. Without a subcommand it is the daemon.

use std::process::ExitCode;

fn main() -> ExitCode {
    flannel_agent::cli::main(std::env::args_os())
}
