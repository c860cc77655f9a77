//! The commands of this workspace: `cargo xtask <command>`.

mod archive;
mod borrowed;
mod build_ebpf;
mod cargo;
mod dist;
mod kernels;
mod labs;
mod libtest;
mod licences;
mod lint;
mod named_tests;
mod namespaces;
mod process;
mod setup;
mod test;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Build, try, test and lint flannel-ebpf.
///
/// Every command first installs what it lacks, and says so before it does.
#[derive(Parser)]
#[command(bin_name = "cargo xtask", version, after_help = EXIT_CODES)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

const EXIT_CODES: &str = "\
Exit codes: 0 done; 1 something failed, the last lines say what; 2 wrong arguments; 130 interrupted.
`demo` and `bench` end with the exit code of the program they start.";

#[derive(Subcommand)]
enum Command {
    /// Install what is missing: rust-src, bpf-linker and the system's packages
    ///
    /// Says first what is missing, what it will do about it and how long that takes. Packages are installed with
    /// apt on Debian and Ubuntu (as root or with sudo); elsewhere they are named, and nothing is installed.
    Setup,
    /// Build the eBPF object into target/bpf and print its path
    ///
    /// One object, with BTF, for amd64 and arm64. `cargo build` of the agent does the same by itself; this
    /// shows the compiler's output, and takes features.
    BuildEbpf(build_ebpf::Args),
    /// Show the overlay at work on this machine (root)
    ///
    /// Starts an agent per node in network namespaces, with two pods each, made by the flannel CNI plugin with the
    /// system's bridge and host-local, and tries every pair
    /// of pods: ping, UDP, TCP, and the path the packets took as the eBPF counters tell it.
    /// Nothing stays behind.
    ///
    /// Flags, all passed on to the demo:
    ///
    ///   --store dir|etcd   where the agents keep their leases; etcd is started and stopped
    ///   --nodes N          how many nodes
    ///   --family 4|6|dual  address family of nodes and pods
    ///   --backend B        vxlan, host-gw (routes, no tunnel) or wireguard (where the kernel has it)
    ///   --direct-routing   with vxlan: no tunnel between nodes on one link; the last of three is behind a router
    ///   --json             a JSON object as the last line
    ///   --keep             leave the nodes running and say how to enter one
    ///
    /// Exit codes: 0 every pair works; 1 otherwise; 2 wrong arguments.
    #[command(verbatim_doc_comment)]
    Demo(labs::Args),
    /// Build and run the tests; the last line is `N passed, N failed, N skipped` (root)
    ///
    /// Tests that measure time (the targets `netns_*` of flannel-agent) come last and run one at a time. A network
    /// namespace that a test leaves behind counts as a failure. After them a part runs on the oldest and the newest kernel of
    /// Debian's and on arm64.
    ///
    /// With --kernel nothing runs here, and everything that means something on another kernel does so there: in virtual
    /// machines, by QEMU without acceleration, which need no root, disk or network. The first time fetches kernels and
    /// programs from Debian into target/kernels (40 and 70 MB for each). What a machine said is in
    /// target/kernels/<kernel>-<arch>-<what it lacks>.
    ///
    /// Exit codes: 0 all passed; 1 a failure, or nothing ran; 2 wrong arguments; 130 interrupted.
    Test(test::Args),
    /// Compare with the kernel's vxlan device and with no overlay (root)
    ///
    /// `cargo xtask bench -- --help` lists the flags of the benchmark itself.
    Bench(labs::Args),
    /// Build what a release consists of: binaries for amd64 and arm64, tarballs, bills of materials, the image
    ///
    /// Static binaries for both architectures, with one eBPF object, in tarballs that come out the same wherever they are
    /// made from a commit (SOURCE_DATE_EPOCH is its time). Each binary is started once, that of another architecture under
    /// QEMU. With --image also the container image, as an OCI layout for skopeo. docs/release.md says how to verify, push
    /// and sign. Takes about 6 minutes for an architecture on two cores, less the second time.
    ///
    /// SOURCE_DATE_EPOCH and FLANNEL_REVISION say what git does not, where there is no repository.
    Dist(dist::Args),
    /// Check formatting, clippy on both targets, docs, dependencies and the tree's hygiene
    ///
    /// All checks run, so that one run shows everything that is wrong. Exit codes: 0 clean; 1 something to mend.
    Lint,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let root = workspace_root();
    if let Err(error) = process::outlive_interrupts() {
        eprintln!("xtask: {error:#}");
        return ExitCode::FAILURE;
    }
    let result = match cli.command {
        Command::Setup => setup::run(&root),
        Command::BuildEbpf(args) => build_ebpf::run(&root, &args),
        Command::Demo(args) => labs::demo(&root, &args),
        Command::Test(args) => test::run(&root, &args),
        Command::Bench(args) => labs::bench(&root, &args),
        Command::Dist(args) => dist::run(&root, &args),
        Command::Lint => lint::run(&root),
    };
    match result {
        _ if process::interrupted() => ExitCode::from(130),
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if error.is::<process::Reported>() => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// The directory above this package; cargo names the package when it runs us.
fn workspace_root() -> PathBuf {
    let package = std::env::var_os("CARGO_MANIFEST_DIR")
        .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from);
    package
        .parent()
        .map_or_else(|| package.clone(), Path::to_path_buf)
}
