//! The lease store in a directory of files.

mod lease_rig;

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use flannel_agent::leases::{DirOptions, ErrorKind, Outcome, Store, StoreConfig};
use flannel_core::config::BackendKind;
use lease_rig::{
    Agent, CONF, FIVE, Log, PATIENCE, attrs, dual, key, offer, snapshot, v6_only, with_previous,
};
use tempfile::TempDir;
use tokio::{task::JoinSet, time::timeout};

/// A lease directory, and what a node needs to use it.
struct Shared(TempDir);

impl Shared {
    fn new() -> Self {
        Shared(tempfile::tempdir().expect("temporary directory"))
    }

    fn config(&self) -> StoreConfig {
        StoreConfig::Dir(DirOptions::new(self.0.path()))
    }

    fn subnets(&self) -> PathBuf {
        self.0.path().join("subnets")
    }

    fn file(&self, name: &str) -> PathBuf {
        self.subnets().join(name)
    }

    /// Writes a lease as another node does: at once.
    fn put(&self, name: &str, node: u8) {
        let scratch = self.0.path().join("scratch");
        fs::write(&scratch, attrs(node).to_json()).expect("write");
        fs::rename(scratch, self.file(name)).expect("rename");
    }

    fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(self.subnets())
            .expect("subnets")
            .map(|entry| {
                entry
                    .expect("entry")
                    .file_name()
                    .into_string()
                    .expect("name")
            })
            .collect();
        names.sort();
        names
    }
}

fn text(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

async fn until(what: &str, wanted: impl Fn() -> bool) {
    let seen = async {
        while !wanted() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    assert!(timeout(PATIENCE, seen).await.is_ok(), "{what}: not in time");
}

#[tokio::test]
async fn files_hold_what_etcd_would_hold() {
    let shared = Shared::new();
    let log = Log::capture();
    let store = Store::open(&shared.config()).await.unwrap();
    let wanted = with_previous(offer(12, CONF), "10.5.3.0-24");
    assert_eq!(store.own_stored(&wanted.identity).await.unwrap(), None);
    let held = store.acquire(&wanted).await.unwrap();
    assert_eq!(held.outcome, Outcome::Previous);
    assert_eq!(shared.names(), ["10.5.3.0-24"]);
    assert_eq!(
        text(&shared.file("10.5.3.0-24")),
        r#"{"PublicIP":"192.168.77.12","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"0a:00:00:00:00:0c"}}"#
    );
    assert_eq!(log.lines(&["INFO", "Lease acquired: 10.5.3.0/24"]).len(), 1);
    let stored = store.own_stored(&wanted.identity).await.unwrap();
    assert_eq!(stored, Some(held.lease));
    let again = store.acquire(&offer(12, CONF)).await.unwrap();
    assert_eq!(again.outcome, Outcome::Reused);
    // A configuration that rules the subnet out moves the lease, and leaves nothing behind.
    let moved = store.acquire(&offer(12, FIVE)).await.unwrap();
    assert_eq!(moved.outcome, Outcome::New);
    assert_eq!(shared.names(), [moved.lease.key.to_string()]);
}

#[tokio::test]
async fn files_of_both_families_and_of_every_backend() {
    for kind in BackendKind::ALL {
        let shared = Shared::new();
        let store = Store::open(&shared.config()).await.unwrap();
        let name = "10.5.6.0-24&fd05:0:0:13::-64";
        let wanted = with_previous(dual(1, kind), name);
        let held = store.acquire(&wanted).await.unwrap();
        assert_eq!(shared.names(), [name], "{kind}");
        assert_eq!(text(&shared.file(name)), wanted.attrs.to_json());
        let stored = store.own_stored(&wanted.identity).await.unwrap();
        assert_eq!(stored, Some(held.lease), "{kind}");
        let mut keys = BTreeSet::new();
        for node in 2..=4 {
            let offer = v6_only(node, kind);
            let held = store.acquire(&offer).await.unwrap();
            assert_eq!(store.acquire(&offer).await.unwrap().lease, held.lease);
            assert_eq!(held.lease.key.v4, None);
            keys.insert(held.lease.key);
        }
        assert_eq!((keys.len(), shared.names().len()), (3, 4), "{kind}");
    }
}

#[tokio::test]
async fn the_configuration_is_in_the_directory_or_where_the_flag_says() {
    let shared = Shared::new();
    let fallback = shared.0.path().join("net-conf.json");
    let options = DirOptions {
        net_config_path: Some(fallback.clone()),
        ..DirOptions::new(shared.0.path())
    };
    let store = Store::open(&StoreConfig::Dir(options)).await.unwrap();
    assert_eq!(
        store.describe(),
        format!("directory {}", shared.0.path().display())
    );
    let error = store.net_conf().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Retry);
    assert!(error.to_string().contains("/config, "), "{error}");
    assert!(error.to_string().contains("net-conf.json"), "{error}");
    fs::write(&fallback, FIVE).unwrap();
    assert_eq!(store.net_conf().await.unwrap(), FIVE);
    fs::write(shared.0.path().join("config"), CONF).unwrap();
    assert_eq!(store.net_conf().await.unwrap(), CONF);
}

#[tokio::test]
async fn a_missing_directory_is_not_made() {
    let shared = Shared::new();
    let missing = shared.0.path().join("not-mounted");
    let store = Store::open(&StoreConfig::Dir(DirOptions::new(&missing)))
        .await
        .unwrap();
    let error = store.acquire(&offer(1, CONF)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Retry);
    assert!(error.chain().contains("not-mounted"), "{}", error.chain());
    assert!(!missing.exists());
}

#[tokio::test]
async fn five_nodes_share_out_the_last_five_subnets() {
    let shared = Shared::new();
    let mut starts = JoinSet::new();
    for node in 1..=5 {
        let config = shared.config();
        starts.spawn(async move { Agent::start(&config, offer(node, FIVE)).await });
    }
    let mut agents = starts.join_all().await;
    let subnets: BTreeSet<_> = agents.iter().map(|agent| agent.held.lease.key).collect();
    assert_eq!(subnets.len(), 5, "{subnets:?}");
    let mut expected = snapshot(&[]);
    for agent in &agents {
        let lease = agent.held.lease.clone();
        expected.leases.insert(lease.key, lease.attrs);
    }
    for agent in &mut agents {
        agent
            .until_leases("everybody sees all five", &expected)
            .await;
    }
    // A sixth waits until one is free.
    let log = Log::capture();
    let config = shared.config();
    let sixth = tokio::spawn(async move { Agent::start(&config, offer(6, FIVE)).await });
    log.until(&["WARN", "no lease yet", "out of subnets"]).await;
    let leaving = agents.remove(0);
    let freed = leaving.held.lease.key;
    leaving.stop().await;
    fs::remove_file(shared.file(&freed.to_string())).unwrap();
    let sixth = timeout(PATIENCE, sixth).await.unwrap().unwrap();
    assert_eq!(sixth.held.lease.key, freed);
    assert!(agents.iter().all(Agent::is_running));
}

#[tokio::test]
async fn nodes_with_different_subnet_sizes_never_overlap() {
    let shared = Shared::new();
    let mut starts = JoinSet::new();
    for node in 1..=6_u8 {
        let config = shared.config();
        let length = if node % 2 == 0 { 24 } else { 25 };
        let conf = format!(
            r#"{{"Network":"10.5.0.0/21","SubnetLen":{length},"Backend":{{"Type":"vxlan"}}}}"#
        );
        starts.spawn(async move {
            let store = Store::open(&config).await.unwrap();
            store.acquire(&offer(node, &conf)).await.unwrap().lease.key
        });
    }
    let keys = starts.join_all().await;
    for (index, a) in keys.iter().enumerate() {
        for b in &keys[index + 1..] {
            let (a, b) = (a.v4.unwrap(), b.v4.unwrap());
            assert!(!a.contains(&b) && !b.contains(&a), "{a} {b}");
        }
    }
    assert_eq!(shared.names().len(), 6);
}

#[tokio::test]
async fn changes_are_seen_at_once() {
    let shared = Shared::new();
    // Without the periodic look: inotify alone has to do.
    let options = DirOptions {
        rescan: Duration::from_hours(1),
        ..DirOptions::new(shared.0.path())
    };
    let wanted = with_previous(offer(1, CONF), "10.5.1.0-24");
    let mut agent = Agent::start(&StoreConfig::Dir(options), wanted).await;
    agent
        .until_leases("alone", &snapshot(&[("10.5.1.0-24", 1)]))
        .await;
    shared.put("10.5.2.0-24", 2);
    let expected = snapshot(&[("10.5.1.0-24", 1), ("10.5.2.0-24", 2)]);
    agent.until_leases("added", &expected).await;
    fs::write(shared.file("10.5.2.0-24"), attrs(22).to_json()).unwrap();
    let expected = snapshot(&[("10.5.1.0-24", 1), ("10.5.2.0-24", 22)]);
    agent.until_leases("changed in place", &expected).await;
    fs::remove_file(shared.file("10.5.2.0-24")).unwrap();
    agent
        .until_leases("removed", &snapshot(&[("10.5.1.0-24", 1)]))
        .await;
}

#[tokio::test]
async fn what_inotify_misses_is_found_by_looking() {
    let shared = Shared::new();
    // The peer's file is a link to another directory, where changes go unnoticed, as over NFS.
    let elsewhere = tempfile::tempdir().unwrap();
    let target = elsewhere.path().join("lease");
    fs::write(&target, attrs(2).to_json()).unwrap();
    let options = DirOptions {
        rescan: Duration::from_millis(200),
        ..DirOptions::new(shared.0.path())
    };
    let wanted = with_previous(offer(1, CONF), "10.5.1.0-24");
    let mut agent = Agent::start(&StoreConfig::Dir(options), wanted).await;
    std::os::unix::fs::symlink(&target, shared.file("10.5.2.0-24")).unwrap();
    let expected = snapshot(&[("10.5.1.0-24", 1), ("10.5.2.0-24", 2)]);
    agent.until_leases("linked", &expected).await;
    fs::write(&target, attrs(22).to_json()).unwrap();
    let expected = snapshot(&[("10.5.1.0-24", 1), ("10.5.2.0-24", 22)]);
    agent.until_leases("changed elsewhere", &expected).await;
}

#[tokio::test]
async fn garbage_hides_nobody() {
    let shared = Shared::new();
    let log = Log::capture();
    let wanted = with_previous(offer(1, CONF), "10.5.1.0-24");
    let mut agent = Agent::start(&shared.config(), wanted).await;
    shared.put("10.5.2.0-24", 2);
    let expected = snapshot(&[("10.5.1.0-24", 1), ("10.5.2.0-24", 2)]);
    agent.until_leases("the peer", &expected).await;
    fs::write(shared.file("README"), "not a lease").unwrap();
    fs::write(shared.file(".10.5.9.0-24.swp"), "hidden").unwrap();
    fs::create_dir(shared.file("10.5.8.0-24")).unwrap();
    fs::write(shared.file("10.5.7.0-24"), [0xff, 0xfe]).unwrap();
    // Half a value: the whole one stays in force.
    fs::write(shared.file("10.5.2.0-24"), r#"{"PublicIP":"192.1"#).unwrap();
    shared.put("10.5.3.0-24", 3);
    let expected = snapshot(&[("10.5.1.0-24", 1), ("10.5.2.0-24", 2), ("10.5.3.0-24", 3)]);
    agent.until_leases("all but the garbage", &expected).await;
    for name in ["README", "10.5.8.0-24", "10.5.7.0-24", "10.5.2.0-24"] {
        log.until(&["WARN", "ignoring an unreadable lease", name])
            .await;
    }
    assert!(log.lines(&["hidden"]).is_empty() && log.lines(&["swp"]).is_empty());
    shared.put("10.5.2.0-24", 22);
    let expected = snapshot(&[("10.5.1.0-24", 1), ("10.5.2.0-24", 22), ("10.5.3.0-24", 3)]);
    agent.until_leases("the whole value", &expected).await;
    assert_eq!(log.lines(&["WARN", "README"]).len(), 1);
}

#[tokio::test]
async fn our_file_comes_back_and_follows_the_offer() {
    let shared = Shared::new();
    let wanted = with_previous(offer(1, CONF), "10.5.1.0-24");
    let mut agent = Agent::start(&shared.config(), wanted).await;
    agent.until("connected", |view| view.connected).await;
    let file = shared.file("10.5.1.0-24");
    fs::remove_file(&file).unwrap();
    until("the file is back", || text(&file) == attrs(1).to_json()).await;

    let mut changed = offer(1, CONF);
    changed.attrs.v4 = attrs(0xee).v4;
    agent.offer.send(changed.clone()).unwrap();
    until("the new value", || text(&file) == changed.attrs.to_json()).await;
    agent
        .until("the view follows", |view| {
            view.own
                .as_ref()
                .is_some_and(|own| own.attrs == changed.attrs)
        })
        .await;

    // Scribbling over it does not last.
    fs::write(&file, "scribble").unwrap();
    until("the value is restored", || {
        text(&file) == changed.attrs.to_json()
    })
    .await;
    assert_eq!(agent.subnet(), key("10.5.1.0-24"));
    agent.stop().await;
    assert_eq!(shared.names(), ["10.5.1.0-24"]);
}

#[tokio::test]
async fn a_subnet_taken_by_another_node_is_given_up() {
    let shared = Shared::new();
    let log = Log::capture();
    let wanted = with_previous(offer(1, CONF), "10.5.1.0-24");
    let mut agent = Agent::start(&shared.config(), wanted).await;
    agent.until("connected", |view| view.connected).await;
    shared.put("10.5.1.0-24", 2);
    let view = agent
        .until("another subnet", |view| {
            view.own
                .as_ref()
                .is_some_and(|own| own.key != key("10.5.1.0-24"))
        })
        .await;
    let lines = log.lines(&["ERROR", "another node took our subnet"]);
    assert_eq!(lines.len(), 1, "{lines:?}");
    assert!(
        lines[0].contains("192.168.77.1\"") && lines[0].contains("192.168.77.2\""),
        "{lines:?}"
    );
    let own = view.own.unwrap();
    let mut expected = snapshot(&[("10.5.1.0-24", 2)]);
    expected.leases.insert(own.key, own.attrs);
    agent.until_leases("both", &expected).await;
}

#[tokio::test]
async fn a_vanished_directory_changes_nothing_and_may_come_back() {
    let shared = Shared::new();
    let log = Log::capture();
    let wanted = with_previous(offer(1, CONF), "10.5.1.0-24");
    let mut agent = Agent::start(&shared.config(), wanted).await;
    shared.put("10.5.2.0-24", 2);
    let expected = snapshot(&[("10.5.1.0-24", 1), ("10.5.2.0-24", 2)]);
    agent.until_leases("both", &expected).await;

    let aside = shared.0.path().join("aside");
    fs::rename(shared.subnets(), &aside).unwrap();
    let view = agent.until("the loss shows", |view| !view.connected).await;
    assert_eq!(view.snapshot.as_deref(), Some(&expected));
    assert!(
        view.last_error
            .is_some_and(|error| error.contains("subnets"))
    );
    log.until(&["WARN", "lease store unreachable"]).await;
    // Nobody makes another one in its place.
    assert!(!shared.subnets().exists());

    // The same directory: what it says is what holds.
    fs::remove_file(aside.join("10.5.2.0-24")).unwrap();
    fs::rename(&aside, shared.subnets()).unwrap();
    shared.put("10.5.3.0-24", 3);
    let after = snapshot(&[("10.5.1.0-24", 1), ("10.5.3.0-24", 3)]);
    let view = agent.until_leases("back", &after).await;
    assert!(view.connected);
    assert_eq!(view.last_error, None);
    assert_eq!(log.lines(&["WARN", "lease store unreachable"]).len(), 1);

    // Another directory: peers are kept while they come back.
    fs::remove_dir_all(shared.subnets()).unwrap();
    agent.until("the loss shows", |view| !view.connected).await;
    fs::create_dir(shared.subnets()).unwrap();
    let file = shared.file("10.5.1.0-24");
    until("our file is in it", || text(&file) == attrs(1).to_json()).await;
    let view = agent.until("connected", |view| view.connected).await;
    assert_eq!(view.snapshot.as_deref(), Some(&after));
    shared.put("10.5.3.0-24", 33);
    let after = snapshot(&[("10.5.1.0-24", 1), ("10.5.3.0-24", 33)]);
    agent.until_leases("the peer came back", &after).await;
}

#[tokio::test]
async fn a_changed_configuration_is_seen_once_it_differs() {
    let dir = tempfile::tempdir().unwrap();
    let other = CONF.replace("vxlan", "VXLAN");
    std::fs::write(dir.path().join("config"), CONF).unwrap();
    let elsewhere = tempfile::tempdir().unwrap();
    let flag = elsewhere.path().join("net-conf.json");
    for (rescan, named) in [
        // By inotify alone, and without it: a directory that is no more cannot be watched.
        (Duration::from_hours(1), "config"),
        (Duration::from_millis(50), "config"),
        (Duration::from_hours(1), "flag"),
    ] {
        let options = DirOptions {
            rescan,
            net_config_path: Some(flag.clone()),
            ..DirOptions::new(dir.path())
        };
        if named == "flag" {
            std::fs::remove_file(dir.path().join("config")).unwrap();
            std::fs::write(&flag, CONF).unwrap();
        }
        let file = match named {
            "flag" => flag.clone(),
            _ => dir.path().join("config"),
        };
        let store = Store::open(&StoreConfig::Dir(options)).await.unwrap();
        let waiting = tokio::spawn(async move { store.net_conf_after(CONF).await });
        let linger = || tokio::time::sleep(Duration::from_millis(300));
        linger().await;
        // Written again with the same text, and gone for a while.
        std::fs::write(&file, CONF).unwrap();
        linger().await;
        std::fs::rename(&file, file.with_extension("away")).unwrap();
        linger().await;
        assert!(!waiting.is_finished(), "{named}");
        std::fs::rename(file.with_extension("away"), &file).unwrap();
        linger().await;
        assert!(!waiting.is_finished(), "{named}");
        let scratch = file.with_extension("new");
        std::fs::write(&scratch, &other).unwrap();
        std::fs::rename(&scratch, &file).unwrap();
        let text = tokio::time::timeout(PATIENCE, waiting).await;
        assert_eq!(text.unwrap().unwrap(), other, "{named}");
        std::fs::write(&file, CONF).unwrap();
    }
}
