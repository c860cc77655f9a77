//! The command line: parse, dispatch, exit codes.
//!
//! Exit codes: 0 stopped on request; 2 a bad flag, configuration or value; 3 the lease store refuses; 4 privilege or kernel; 1
//! anything else.

mod args;
mod check;
pub(crate) mod cleanup;
mod docker_opts;
mod features;
mod install_conf;
mod peers;
mod status;
mod table;

use std::{ffi::OsString, process::ExitCode};

use clap::error::{ContextKind, ContextValue, ErrorKind};
use tokio_util::sync::CancellationToken;

pub(crate) use args::last_known_state;
pub use args::{
    Args, AttachChoice, Command, DatapathChoice, DeviceChoice, EtcdArgs, FastPathChoice,
    FirewallArgs, KubeArgs, KubeVariables, LogFormat, Output, RulesetChoice, ServingArgs,
    UplinkArgs, XdpChoice,
};

use crate::{app, telemetry};

/// What `--version` says: a release adds the commit and the platform that it was built from and for.
pub const VERSION: &str = match option_env!("FLANNEL_VERSION") {
    Some(version) => version,
    None => env!("CARGO_PKG_VERSION"),
};
/// Exit code for bad flags, configuration and values.
pub const EXIT_USAGE: u8 = 2;
/// Exit code for a lease store that refuses.
pub const EXIT_STORE: u8 = 3;
/// Exit code for missing privilege or kernel support.
pub const EXIT_KERNEL: u8 = 4;

/// Runs the program with these arguments, the first being its name.
pub fn main(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let arguments: Vec<OsString> = arguments.into_iter().collect();
    if let Some(options) = docker_opts::asked_for(&arguments) {
        return docker_opts::main(options);
    }
    if let Some(asked) = install_conf::asked_for(&arguments) {
        return install_conf::main(&asked);
    }
    let program = args::program(arguments.first());
    let args = match Args::read(arguments) {
        Ok(args) => args,
        Err(error) => return usage(&program, &error),
    };
    telemetry::init(args.verbosity, args.serving.log_format);
    share_memory();
    // What waits for a disk or for a name is on threads of its own. With more than this one for the rest, two would wake each other for every
    // answer of the kernel's, of which a node with thousands of peers gets as many at its start.
    let runtime = match tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => {
            tracing::error!(%error, "start the runtime");
            return ExitCode::FAILURE;
        }
    };
    let code = runtime.block_on(dispatch(args));
    // A blocked name lookup must not hold up the exit.
    runtime.shutdown_background();
    code
}

/// Makes all threads take memory from one place. Each would keep its own of what was freed, which with thousands of nodes doubles what
/// the process needs, and nothing here is quick enough to gain by it.
#[cfg(target_env = "gnu")]
fn share_memory() {
    #[expect(unsafe_code, reason = "the C library has no other way to say it")]
    // SAFETY: plain numbers, before there are other threads.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
        libc::mallopt(libc::M_TRIM_THRESHOLD, 128 << 10);
    }
}

/// Other C libraries have one place.
#[cfg(not(target_env = "gnu"))]
fn share_memory() {}

async fn dispatch(args: Args) -> ExitCode {
    match &args.command {
        None => Box::pin(daemon(args)).await,
        Some(Command::Status { output, features }) => {
            report(status::run(&args, *output, *features).await)
        }
        Some(Command::Features { output }) => report(features::run(&args, *output)),
        Some(Command::Peers { output }) => report(peers::run(&args, *output).await),
        Some(Command::Cleanup {
            dry_run,
            vni,
            keep_device,
            force,
        }) => {
            let scope = cleanup::Scope {
                dry_run: *dry_run,
                vni: *vni,
                keep_device: *keep_device,
                force: *force,
            };
            report(cleanup::run(&args, scope).await)
        }
        Some(Command::Check {
            output,
            no_peers,
            timeout,
        }) => report(check::run(&args, *output, *no_peers, *timeout).await),
        // With flags of the daemon in front of it.
        Some(Command::MkDockerOpts) => docker_opts::main(&[]),
        Some(Command::InstallConf {
            source,
            destination,
        }) => install_conf::run(source, destination),
        Some(Command::Version) => {
            table::line(VERSION);
            ExitCode::SUCCESS
        }
    }
}

async fn daemon(args: Args) -> ExitCode {
    tracing::info!("{}", telemetry::one_line(&args.effective()));
    for warning in &args.warnings {
        tracing::warn!("{}", telemetry::one_line(warning));
    }
    let cancel = CancellationToken::new();
    if let Err(error) = watch_signals(&cancel) {
        tracing::error!(%error, "watch for signals");
        return ExitCode::FAILURE;
    }
    match app::run(&args, cancel).await {
        Ok(()) => {
            tracing::info!("Exiting cleanly...");
            ExitCode::SUCCESS
        }
        Err(error) => {
            tracing::error!("{}", telemetry::one_line(&telemetry::chain(&error)));
            ExitCode::from(error.exit_code())
        }
    }
}

/// The first SIGTERM or SIGINT asks for an orderly stop, a second one ends the process at once.
fn watch_signals(cancel: &CancellationToken) -> std::io::Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let cancel = cancel.clone();
    tokio::spawn(async move {
        loop {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            if cancel.is_cancelled() {
                std::process::exit(130);
            }
            tracing::info!("shutdownHandler sent cancel signal...");
            tracing::info!("Waiting for all goroutines to exit");
            cancel.cancel();
        }
    });
    Ok(())
}

/// A read-only command's answer: what it found to be wrong is an exit code of 1, not an error.
fn report(outcome: anyhow::Result<bool>) -> ExitCode {
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            table::complaint(&format!("{error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn usage(program: &str, error: &clap::Error) -> ExitCode {
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
            // Nobody to tell if standard output is closed.
            let _closed = error.print();
            ExitCode::SUCCESS
        }
        _ => {
            // clap's first paragraph says what is wrong; its usage block is one `--help` away.
            let text = error.render().to_string();
            let paragraph = text.split("\n\n").next().unwrap_or_default();
            let what = paragraph
                .split("\n  [possible values")
                .next()
                .unwrap_or_default();
            let what = what.strip_prefix("error: ").unwrap_or(what).trim();
            let variable = Args::variable_of(error).map(|name| format!(" (from {name})"));
            let fix = match (
                error.get(ContextKind::ValidValue),
                error.get(ContextKind::SuggestedArg),
            ) {
                (Some(ContextValue::Strings(values)), _) if !values.is_empty() => {
                    format!(": use one of {}", values.join(", "))
                }
                (_, Some(ContextValue::String(similar))) => format!(": did you mean {similar}?"),
                _ => String::new(),
            };
            table::complaint_of(
                program,
                &format!(
                    "{what}{}{fix}; see {program} --help",
                    variable.unwrap_or_default()
                ),
            );
            ExitCode::from(EXIT_USAGE)
        }
    }
}
