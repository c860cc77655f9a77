//! The first process of the machines in which `cargo xtask test --kernel` tries other kernels: mounts what programs expect, starts
//! the test binaries that [`PLAN`] names one after the other, and says how each ended on a port of its own, apart from the kernel's
//! console.
//!
//! Every line that is not a test's begins with [`MARK`]:
//!
//! ```text
//! @guest kernel 6.1.0-50-cloud-amd64
//! @guest begin NAME
//! @guest end NAME STATUS SECONDS
//! @guest file PATH          the lines up to the next mark are its content
//! @guest left NAMESPACE
//! @guest tainted 0          the last line
//! ```

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use flannel_testkit::{BpfCall, Confinement, confine, process};
use nix::mount::{MsFlags, mount};
use nix::sys::wait::{self, WaitStatus};
use serde_json::Value;

const MARK: &str = "@guest";
/// What to run, as JSON.
const PLAN: &str = "/guest/plan.json";
/// Where tests leave what is to be kept (`FLANNEL_TEST_KEEP`).
const KEEP: &str = "/run/keep";
/// Directories that programs expect beside. They are in memory as all is, and may hold programs: nothing is mounted on them.
const DIRECTORIES: [&str; 3] = ["/tmp", "/var/tmp", "/root"];
/// What the process that does the work is called with: the first process only waits for those whose parents have gone.
const WORK: &str = "work";

/// Type and place of the file systems that everything else expects.
const MOUNTS: [(&str, &str); 10] = [
    ("proc", "/proc"),
    ("sysfs", "/sys"),
    ("devtmpfs", "/dev"),
    ("devpts", "/dev/pts"),
    ("tmpfs", "/dev/shm"),
    ("tmpfs", "/run"),
    ("debugfs", "/sys/kernel/debug"),
    ("securityfs", "/sys/kernel/security"),
    ("cgroup2", "/sys/fs/cgroup"),
    ("bpf", "/sys/fs/bpf"),
];

fn main() {
    let is_worker = std::env::args().nth(1).is_some_and(|word| word == WORK);
    let outcome = if is_worker { work() } else { first() };
    if let Err(error) = outcome {
        // The console: nobody else may be there to be told.
        println!("{MARK} broken: {error:#}");
    }
    if !is_worker {
        // SAFETY: no pointers; nothing is mounted that could lose anything.
        let answer = unsafe { libc::reboot(libc::RB_POWER_OFF) };
        println!("power off: {answer}, {}", io::Error::last_os_error());
    }
}

/// What only the first process can do.
fn first() -> anyhow::Result<()> {
    for (kind, place) in MOUNTS {
        fs::create_dir_all(place).with_context(|| format!("create {place}"))?;
        let mounted = mount(
            Some(kind),
            place,
            Some(kind),
            MsFlags::empty(),
            None::<&str>,
        );
        mounted.with_context(|| format!("mount {kind} on {place}"))?;
    }
    for place in DIRECTORIES {
        fs::create_dir_all(place).with_context(|| format!("create {place}"))?;
    }
    let worker = Command::new("/proc/self/exe")
        .arg(WORK)
        .stdin(Stdio::null())
        .spawn()
        .context("start the worker")?;
    let worker = i32::try_from(worker.id())?;
    loop {
        match wait::wait().context("wait for children")? {
            WaitStatus::Exited(pid, _) | WaitStatus::Signaled(pid, _, _)
                if pid.as_raw() == worker =>
            {
                return Ok(());
            }
            _ => {}
        }
    }
}

fn work() -> anyhow::Result<()> {
    let text = fs::read_to_string(PLAN).with_context(|| format!("read {PLAN}"))?;
    let plan: Value = serde_json::from_str(&text).with_context(|| format!("understand {PLAN}"))?;
    for module in words(&plan["modules"]) {
        succeed(Command::new("modprobe").arg(module))?;
    }
    succeed(Command::new("ip").args(["link", "set", "lo", "up"]))?;
    fs::create_dir_all(KEEP).with_context(|| format!("create {KEEP}"))?;
    let mut port = open_port()?;
    let release = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    writeln!(port, "{MARK} kernel {}", release.trim_end())?;
    let bpf = match plan["refuse_bpf"].as_i64() {
        Some(errno) => BpfCall::Fails(i32::try_from(errno)?),
        None => BpfCall::Allowed,
    };
    for suite in plan["suites"].as_array().context("suites in the plan")? {
        run(suite, bpf, &mut port)?;
    }
    for path in files(Path::new(KEEP))? {
        let name = path.strip_prefix(KEEP)?.display();
        writeln!(port, "{MARK} file {name}")?;
        let content = fs::read(&path).with_context(|| format!("read {}", path.display()))?;
        port.write_all(&content)?;
        if !content.ends_with(b"\n") {
            writeln!(port)?;
        }
    }
    for namespace in namespaces() {
        writeln!(port, "{MARK} left {namespace}")?;
    }
    let tainted = fs::read_to_string("/proc/sys/kernel/tainted")?;
    writeln!(port, "{MARK} tainted {}", tainted.trim_end())?;
    Ok(())
}

/// Runs one test binary; what it says goes to the port as it comes.
fn run(suite: &Value, bpf: BpfCall, port: &mut File) -> anyhow::Result<()> {
    let name = suite["name"].as_str().context("a suite's name")?;
    let program = suite["program"].as_str().context("a suite's program")?;
    let limit = Duration::from_secs(suite["limit"].as_u64().context("a suite's limit")?);
    writeln!(port, "{MARK} begin {name}")?;
    let mut command = Command::new(program);
    command
        .args(words(&suite["args"]))
        .current_dir(suite["dir"].as_str().unwrap_or("/"))
        .env("FLANNEL_TEST_KEEP", KEEP)
        .stdin(Stdio::null())
        .stdout(port.try_clone()?)
        .stderr(port.try_clone()?);
    for (variable, value) in suite["env"].as_object().into_iter().flatten() {
        command.env(variable, value.as_str().unwrap_or_default());
    }
    let confinement = Confinement {
        bpf,
        ..Confinement::default()
    };
    // All that the tests start inherits it: the agents, and bpftool.
    confine(&mut command, &confinement);
    let started = Instant::now();
    let status = match command.spawn() {
        Ok(mut child) => wait(&mut child, limit)?,
        Err(error) => format!("not-started:{error}").replace(' ', "-"),
    };
    let seconds = started.elapsed().as_secs_f32();
    // A test that was killed may have been in the middle of a line.
    writeln!(port, "\n{MARK} end {name} {status} {seconds:.1}")?;
    Ok(())
}

/// One word about how it ended.
fn wait(child: &mut Child, limit: Duration) -> anyhow::Result<String> {
    let ended = process::wait_timeout(child, limit)?;
    if ended.is_none() {
        process::kill_and_reap(child);
    }
    Ok(ended.map_or_else(|| format!("killed-after-{}-s", limit.as_secs()), describe))
}

fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(0), _) => "ok".to_owned(),
        (Some(code), _) => format!("code-{code}"),
        (None, signal) => format!("signal-{}", signal.unwrap_or_default()),
    }
}

/// The port on which the host listens.
fn open_port() -> anyhow::Result<File> {
    let found = flannel_testkit::try_eventually(Duration::from_mins(1), "a port", || {
        let mut entries = fs::read_dir("/dev").into_iter().flatten().flatten();
        let port = entries.find(|entry| entry.file_name().as_encoded_bytes().starts_with(b"vport"));
        port.map(|port| port.path()).ok_or("no /dev/vport*")
    })?;
    OpenOptions::new()
        .write(true)
        .open(&found)
        .with_context(|| format!("open {}", found.display()))
}

fn succeed(command: &mut Command) -> anyhow::Result<()> {
    let status = command
        .status()
        .with_context(|| format!("start {command:?}"))?;
    ensure!(status.success(), "{command:?}: {status}");
    Ok(())
}

fn words(value: &Value) -> impl Iterator<Item = &str> {
    value
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
}

/// All files below a directory, in order.
fn files(dir: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).with_context(|| format!("list {}", dir.display()))? {
        let path = entry?.path();
        if path.is_dir() {
            found.extend(files(&path)?);
        } else {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

/// Namespaces of labs, none of which runs any more.
fn namespaces() -> Vec<String> {
    let entries = fs::read_dir("/run/netns").into_iter().flatten().flatten();
    entries
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .filter(|name| name.starts_with("fe-"))
        .collect()
}
