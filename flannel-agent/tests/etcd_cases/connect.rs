//! Reaching etcd: endpoints, TLS, users, and what is said when it does not work.

use std::process::Command;

use flannel_agent::leases::{ErrorKind, EtcdOptions, Store, StoreConfig};
use tokio_util::sync::CancellationToken;

use super::{CONFIG_KEY, config, options};
use crate::{
    etcd_server::EtcdServer,
    lease_rig::{Agent, CONF, Log, offer},
};

#[tokio::test]
async fn the_first_working_endpoint_is_used_and_prefixes_are_cleaned() {
    let etcd = EtcdServer::start();
    etcd.ctl(&["put", "/other/net/config", CONF]);
    let dead = "http://127.0.0.1:1";
    let options = EtcdOptions {
        endpoints: vec![format!("{dead},{}", etcd.url())],
        prefix: "//other/./net/".to_owned(),
        ..EtcdOptions::default()
    };
    let log = Log::capture();
    let store = Store::open(&StoreConfig::Etcd(options)).await.unwrap();
    assert_eq!(store.net_conf().await.unwrap(), CONF);
    assert_eq!(
        store.describe(),
        format!("etcd {dead},{} prefix /other/net", etcd.url())
    );
    assert!(log.lines(&["WARN"]).is_empty());

    let store = Store::open(&config(&etcd)).await.unwrap();
    let error = store.net_conf().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Retry);
    let text = error.to_string();
    assert!(
        text.contains("Did you create your config using etcdv3 API?"),
        "{text}"
    );
    assert!(text.contains(CONFIG_KEY), "{text}");

    let options = EtcdOptions {
        endpoints: vec![dead.to_owned()],
        ..EtcdOptions::default()
    };
    let store = Store::open(&StoreConfig::Etcd(options)).await.unwrap();
    for _ in 0..3 {
        let error = store.net_conf().await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Retry);
        let text = error.chain();
        assert!(text.contains(dead) && text.contains("refused"), "{text}");
    }
    assert_eq!(
        log.lines(&["WARN", "lease store unreachable", dead]).len(),
        1
    );
    // Waiting for a lease ends when asked to.
    let cancel = CancellationToken::new();
    let wanted = offer(1, CONF);
    let waiting = store.acquire_until(&wanted, &cancel);
    let (result, ()) = tokio::join!(waiting, async { cancel.cancel() });
    assert!(result.is_none());
}

/// Where flannel before 0.18 left its configuration: the same server, in a store of its own.
#[tokio::test]
async fn a_configuration_of_the_version_2_api_is_missing_with_upstreams_hint() {
    let etcd = EtcdServer::start_with("http", &["--enable-v2=true"]);
    let done = Command::new("etcdctl")
        .env("ETCDCTL_API", "2")
        .args(["--endpoints", &etcd.url(), "set", CONFIG_KEY, CONF])
        .output()
        .expect("etcdctl");
    assert!(done.status.success(), "{done:?}");
    let store = Store::open(&config(&etcd)).await.unwrap();
    let error = store.net_conf().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Retry);
    let text = error.to_string();
    let hint =
        "flannel config not found in etcd store. Did you create your config using etcdv3 API?";
    assert!(text.starts_with(hint), "{text}");
    // And it is found as soon as it is where it belongs.
    etcd.ctl(&["put", CONFIG_KEY, CONF]);
    assert_eq!(store.net_conf().await.unwrap(), CONF);
}

#[tokio::test]
async fn bad_options_are_named() {
    let good = EtcdOptions::default;
    let cases = [
        (
            EtcdOptions {
                endpoints: vec![",".to_owned()],
                ..good()
            },
            "no etcd endpoint",
        ),
        (
            EtcdOptions {
                endpoints: vec!["ftp://a".to_owned()],
                ..good()
            },
            "ftp://a",
        ),
        (
            EtcdOptions {
                certfile: Some("/c".into()),
                ..good()
            },
            "--etcd-certfile is given without --etcd-keyfile",
        ),
        (
            EtcdOptions {
                keyfile: Some("/k".into()),
                ..good()
            },
            "--etcd-keyfile is given without --etcd-certfile",
        ),
        (
            EtcdOptions {
                password: Some("hunter2".to_owned()),
                ..good()
            },
            "without --etcd-username",
        ),
        (
            EtcdOptions {
                endpoints: vec!["https://127.0.0.1:1".to_owned()],
                cafile: Some("/nonexistent/ca.pem".into()),
                ..good()
            },
            "read --etcd-cafile /nonexistent/ca.pem",
        ),
        (
            EtcdOptions {
                endpoints: vec!["https://127.0.0.1:1".to_owned()],
                certfile: Some("/dev/null".into()),
                keyfile: Some("/dev/null".into()),
                ..good()
            },
            "https://127.0.0.1:1",
        ),
    ];
    for (options, expected) in cases {
        let error = Store::open(&StoreConfig::Etcd(options)).await.unwrap_err();
        let text = error.chain();
        assert_eq!(error.kind(), ErrorKind::Config, "{text}");
        assert!(text.contains(expected), "{text}");
        assert!(!text.contains("hunter2"), "{text}");
    }
}

#[tokio::test]
async fn passwords_are_used_and_never_shown() {
    let etcd = EtcdServer::start();
    let log = Log::capture();
    let with = |password: &str| EtcdOptions {
        username: Some("root".to_owned()),
        password: Some(password.to_owned()),
        ..options(&etcd)
    };
    // etcd without authentication takes no token; the name is not needed then.
    let store = Store::open(&StoreConfig::Etcd(with("hunter2")))
        .await
        .unwrap();
    store.acquire(&offer(1, CONF)).await.unwrap();

    etcd.ctl(&["user", "add", "root:hunter2"]);
    etcd.ctl(&["auth", "enable"]);
    let mut agent = Agent::start(&StoreConfig::Etcd(with("hunter2")), offer(1, CONF)).await;
    agent.until("connected", |view| view.connected).await;

    let store = Store::open(&StoreConfig::Etcd(with("hunter3")))
        .await
        .unwrap();
    let error = store.net_conf().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Refused, "{error}");
    assert!(
        error.to_string().contains("authentication failed"),
        "{error}"
    );
    let store = Store::open(&config(&etcd)).await.unwrap();
    let error = store.net_conf().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Refused, "{error}");

    let shown = format!(
        "{} {store:?} {:?} {error:?}",
        store.describe(),
        with("hunter2")
    );
    // Down to TRACE, the libraries included.
    let logged = log.text();
    for line in logged.lines().chain([shown.as_str()]) {
        assert!(!line.contains("hunter"), "{line}");
    }
}

#[tokio::test]
async fn a_user_who_may_not_write_is_told_so_once() {
    let etcd = EtcdServer::start();
    etcd.ctl(&["user", "add", "root:secret"]);
    etcd.ctl(&["user", "add", "reader:secret"]);
    etcd.ctl(&["role", "add", "readers"]);
    etcd.ctl(&[
        "role",
        "grant-permission",
        "readers",
        "--prefix=true",
        "read",
        "/",
    ]);
    etcd.ctl(&["user", "grant-role", "reader", "readers"]);
    etcd.ctl(&["auth", "enable"]);
    let log = Log::capture();
    let options = EtcdOptions {
        username: Some("reader".to_owned()),
        password: Some("secret".to_owned()),
        ..options(&etcd)
    };
    let store = Store::open(&StoreConfig::Etcd(options)).await.unwrap();
    let error = store.acquire(&offer(1, CONF)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Refused);
    assert!(
        error.chain().contains("permission denied"),
        "{}",
        error.chain()
    );
    let cancel = CancellationToken::new();
    let wanted = offer(1, CONF);
    let waiting = store.acquire_until(&wanted, &cancel);
    let refusals = || log.lines(&["DEBUG", "gave back"]).len();
    let (result, ()) = tokio::join!(waiting, async {
        etcd.until("three more attempts", |_| refusals() >= 4).await;
        cancel.cancel();
    });
    assert!(result.is_none());
    assert_eq!(
        log.lines(&["WARN", "no lease yet", "permission denied"])
            .len(),
        1
    );
    assert!(log.lines(&["WARN", "unreachable"]).is_empty());
    let listed = etcd.ctl(&["--user=root:secret", "lease", "list"]);
    assert!(listed.starts_with("found 0 leases"), "{listed}");
}

#[tokio::test]
async fn tls_with_client_certificates() {
    let pki = Pki::new();
    let etcd = EtcdServer::start_with(
        "https",
        &[
            "--cert-file",
            &pki.path("server.pem"),
            "--key-file",
            &pki.path("server.key"),
            "--trusted-ca-file",
            &pki.path("ca.pem"),
            "--client-cert-auth",
        ],
    );
    let with = |ca: &str, client: bool| EtcdOptions {
        cafile: Some(pki.path(ca).into()),
        certfile: client.then(|| pki.path("client.pem").into()),
        keyfile: client.then(|| pki.path("client.key").into()),
        ..options(&etcd)
    };
    let mut agent = Agent::start(&StoreConfig::Etcd(with("ca.pem", true)), offer(1, CONF)).await;
    agent.until("connected", |view| view.connected).await;

    // The server asks for a certificate, and the client does not trust just anybody.
    for options in [with("ca.pem", false), with("other.pem", true)] {
        let store = Store::open(&StoreConfig::Etcd(options)).await.unwrap();
        let error = store.net_conf().await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Retry);
        let text = error.chain().to_lowercase();
        assert!(text.contains("certificate"), "{text}");
    }
    // Certificates do not make a plain endpoint a TLS one.
    let plain = EtcdServer::start();
    let options = EtcdOptions {
        endpoints: vec![plain.url()],
        ..with("ca.pem", true)
    };
    let store = Store::open(&StoreConfig::Etcd(options)).await.unwrap();
    store.acquire(&offer(1, CONF)).await.unwrap();
}

/// Certificates for one test, made by the openssl command.
struct Pki(tempfile::TempDir);

impl Pki {
    fn new() -> Self {
        let pki = Pki(tempfile::tempdir().unwrap());
        for ca in ["ca", "other"] {
            pki.openssl(&format!(
                "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN={ca} -keyout {ca}.key -out {ca}.pem"
            ));
        }
        std::fs::write(pki.path("ext"), "subjectAltName=IP:127.0.0.1\n").unwrap();
        for name in ["server", "client"] {
            pki.openssl(&format!(
                "req -newkey rsa:2048 -nodes -subj /CN={name} -keyout {name}.key -out {name}.csr"
            ));
            pki.openssl(&format!(
                "x509 -req -in {name}.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -extfile ext -out {name}.pem"
            ));
        }
        pki
    }

    fn path(&self, name: &str) -> String {
        self.0.path().join(name).display().to_string()
    }

    fn openssl(&self, args: &str) {
        let output = Command::new("openssl")
            .args(args.split(' '))
            .current_dir(self.0.path())
            .output()
            .expect("openssl");
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
}
