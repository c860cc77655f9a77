//! What depends on the kernel: what it can do, what the agent makes of that, and that the overlay works in every way there is.
//!
//! What a kernel lacks is known from the environment ([`lacking`]). `FLANNEL_TEST_KEEP` names a directory for facts and for the verifier's
//! accounts.

#[path = "rig/confined.rs"]
mod confined;
#[path = "rig/lacking.rs"]
mod lacking;
#[path = "netns_kernel/overlay.rs"]
mod overlay;
mod rig;
#[path = "netns_kernel/rung.rs"]
mod rung;
#[path = "netns_kernel/stack.rs"]
mod stack;
#[path = "netns_kernel/verifier.rs"]
mod verifier;
mod wire_rig;

use std::{env, fs, io::Write as _, path::PathBuf};

use flannel_agent::dataplane::bpf::{AttachMode, Bpf, Instance, LoadOptions};
use flannel_core::{addr::Vni, mark::Overlay};
use flannel_testkit::privileged;
use lacking::lacks;
use nix::sys::resource::{Resource, setrlimit};

/// `BPF_F_ADJ_ROOM_ENCAP_L2_ETH` in `include/uapi/linux/bpf.h`.
const ENCAP_L2_ETH: u32 = 1 << 6;
/// An identifier that no other test uses.
const VNI: u32 = 4242;

/// Keeps a file, where somebody wants it.
fn keep(name: &str, text: &str) {
    let Some(dir) = env::var_os("FLANNEL_TEST_KEEP") else {
        return;
    };
    let path = PathBuf::from(dir).join(name);
    fs::create_dir_all(path.parent().expect("a directory")).expect("make a directory");
    let mut file = fs::File::options()
        .create(true)
        .append(true)
        .open(&path)
        .expect("open a file");
    file.write_all(text.as_bytes()).expect("keep a file");
}

/// As the agent does: kernels before 5.11 count maps against it. Where that is refused, loading says whether it mattered.
fn raise_memlock() {
    let unlimited = nix::libc::RLIM_INFINITY;
    let _refused = setrlimit(Resource::RLIMIT_MEMLOCK, unlimited, unlimited);
}

#[test]
fn the_kernel_can_what_is_known_of_it() {
    if !privileged() {
        return;
    }
    raise_memlock();
    let attach = AttachMode::detect();
    let bpf = Bpf::load(&LoadOptions {
        instance: Instance::of(Overlay::v4(Vni::try_from(VNI).expect("a VNI")))
            .expect("an instance"),
        subnet_count: 256,
        attach,
        flow_entries: 1024,
        last_port: false,
    })
    .expect("the programs load");
    let room = bpf.room();
    let obstacle = bpf.gate_obstacle().map(str::to_owned);
    bpf.discard();
    let l2_eth = room.encap & ENCAP_L2_ETH != 0;
    let attach = attach.as_str();
    keep(
        "facts",
        &format!(
            "attach {attach}\nl2_eth {l2_eth}\ndecap_l4_udp {}\n",
            room.clears_gso
        ),
    );
    assert_eq!(attach == "tcx", !lacks("tcx"), "{attach}");
    assert_eq!(l2_eth, !lacks("l2_eth"), "{room:x?}");
    assert_eq!(obstacle, None, "the programs of the flow gate");
}
