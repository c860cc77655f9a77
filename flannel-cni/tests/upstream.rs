//! The plugin beside upstream's own, release 0.9.0 of the CNI plugins: what both hand to a delegate, keep, and refuse.

use std::{
    fs,
    io::Write as _,
    os::unix::fs::PermissionsExt as _,
    path::PathBuf,
    process::{Command, Output, Stdio},
};

use flannel_testkit::put_program;
use serde_json::{Value, json};
use tempfile::TempDir;

const ENV: &str = "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.1.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n";
/// Keeps what it is called with, and answers.
const DELEGATE: &str = r#"#!/bin/sh
here=$(dirname "$0")
cat > "$here/../stdin"
env | grep ^CNI_ | grep -v ^CNI_PATH= | sort > "$here/../environment"
version=$(sed 's/.*"cniVersion":"\([^"]*\)".*/\1/' "$here/../stdin")
test "$CNI_COMMAND" = ADD && echo '{"cniVersion":"'"$version"'","ips":[{"version":"4","address":"10.244.1.7/24"}],"dns":{}}'
exit 0
"#;

fn theirs() -> PathBuf {
    flannel_testkit::cni::upstream_plugin().unwrap()
}

fn ours() -> PathBuf {
    PathBuf::from(env!("CARGO_BIN_EXE_flannel"))
}

/// What one plugin did.
#[derive(Debug, PartialEq)]
struct Done {
    succeeded: bool,
    result: Value,
    /// What the delegate read, byte for byte, and its environment.
    delegated: Option<String>,
    environment: Option<String>,
    /// What is kept for DEL, and its mode.
    kept: Option<(String, u32)>,
}

struct Place {
    dir: TempDir,
    plugin: PathBuf,
}

impl Place {
    fn new(plugin: PathBuf, env: &str) -> Place {
        let dir = tempfile::tempdir().unwrap();
        let bin = dir.path().join("bin");
        fs::create_dir(&bin).unwrap();
        for name in ["bridge", "ptp"] {
            let delegate = bin.join(name);
            put_program(&delegate, DELEGATE);
        }
        fs::write(dir.path().join("subnet.env"), env).unwrap();
        Place { dir, plugin }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn call(&self, verb: &str, conf: &Value) -> Done {
        for name in ["stdin", "environment"] {
            let _absent = fs::remove_file(self.at(name));
        }
        let mut conf = conf.clone();
        conf["subnetFile"] = json!(self.at("subnet.env"));
        conf["dataDir"] = json!(self.at("data"));
        let mut child = Command::new(&self.plugin)
            .env_clear()
            .env("PATH", "/usr/bin:/bin")
            .env("CNI_COMMAND", verb)
            .env("CNI_CONTAINERID", "c0ffee")
            .env("CNI_NETNS", "/run/netns/of-no-pod")
            .env("CNI_IFNAME", "eth0")
            .env("CNI_ARGS", "IgnoreUnknown=1;K8S_POD_NAME=p")
            .env("CNI_PATH", self.at("bin"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdin = child.stdin.take().unwrap();
        stdin.write_all(conf.to_string().as_bytes()).unwrap();
        drop(stdin);
        let Output { status, stdout, .. } = child.wait_with_output().unwrap();
        let kept = self.at("data").join("c0ffee");
        Done {
            succeeded: status.success(),
            result: serde_json::from_slice(&stdout).unwrap_or(Value::Null),
            delegated: fs::read_to_string(self.at("stdin")).ok(),
            environment: fs::read_to_string(self.at("environment")).ok(),
            kept: fs::read_to_string(&kept).ok().map(|text| {
                let mode = fs::metadata(&kept).unwrap().permissions().mode();
                (text, mode)
            }),
        }
    }
}

/// Upstream says `subnet` to `host-local` up to release 0.9, `ranges` since its plugin lives in a repository of its own. Both are
/// `host-local`'s own, and mean the same for one subnet.
fn modern(text: &str) -> String {
    let mut conf: Value = serde_json::from_str(text).unwrap();
    let ipam = conf["ipam"].as_object_mut().unwrap();
    if let Some(subnet) = ipam.remove("subnet") {
        ipam.insert("ranges".into(), json!([[{ "subnet": subnet }]]));
    }
    conf.to_string()
}

fn conf(more: &Value) -> Value {
    let mut conf = json!({"name": "cbr0", "cniVersion": "0.3.1", "type": "flannel"});
    for (key, value) in more.as_object().unwrap() {
        conf[key] = value.clone();
    }
    conf
}

#[test]
fn delegates_cannot_tell_them_apart() {
    let cases = [
        json!({}),
        json!({"delegate": {"hairpinMode": true, "isDefaultGateway": true}}),
        json!({"delegate": {"type": "ptp"}}),
        json!({"delegate": {"isGateway": false, "bridge": "br-pods"}}),
        json!({"delegate": {"ipMasq": true, "mtu": 1400}}),
        json!({"delegate": {"cniVersion": "0.2.0"}}),
        json!({"cniVersion": "0.3.0"}),
        json!({"cniVersion": "0.4.0"}),
        json!({"ipam": {"routes": [{"dst": "192.0.2.0/24", "gw": "10.244.1.9"}]}}),
        json!({"ipam": {"dataDir": "/run/ipam"}}),
        json!({"runtimeConfig": {"portMappings": [{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}]}}),
        json!({"delegate": {"name": "other"}}),
        json!({"delegate": {"ipam": {}}}),
        json!({"delegate": {"type": 7}}),
    ];
    for env in [
        ENV.to_owned(),
        ENV.replace("=true", "=false"),
        // Only exactly `true` is.
        ENV.replace("=true", "=yes"),
        format!("UNKNOWN=1\n{ENV}FLANNEL_EXTRA=x\n"),
        // Masked.
        ENV.replace("10.244.1.1/24", "10.244.1.77/26"),
    ] {
        for case in &cases {
            let [mut theirs, ours] =
                [theirs(), ours()].map(|plugin| Place::new(plugin, &env).call("ADD", &conf(case)));
            if let Some(text) = &mut theirs.delegated {
                *text = modern(text);
            }
            if let Some((text, _)) = &mut theirs.kept {
                *text = modern(text);
            }
            assert_eq!(ours, theirs, "{case} {env}");
        }
    }
}

#[test]
fn each_takes_down_what_the_other_has_set_up() {
    let conf = conf(&json!({"delegate": {"hairpinMode": true}}));
    for (first, second) in [(ours(), theirs()), (theirs(), ours())] {
        let mut place = Place::new(first, ENV);
        let added = place.call("ADD", &conf);
        assert!(added.succeeded, "{added:?}");
        let (kept, _) = added.kept.unwrap();
        place.plugin = second;
        // `subnet.env` may be gone by then.
        fs::remove_file(place.at("subnet.env")).unwrap();
        let gone = place.call("DEL", &conf);
        assert!(gone.succeeded && gone.kept.is_none(), "{gone:?}");
        assert_eq!(gone.delegated.as_ref(), Some(&kept));
        // Again, as runtimes do.
        let again = place.call("DEL", &conf);
        assert!(again.succeeded && again.delegated.is_none(), "{again:?}");
    }
}

#[test]
fn what_upstream_refuses_is_refused() {
    for env in [
        "",
        "FLANNEL_NETWORK=10.244.0.0/16\n",
        "FLANNEL_NETWORK=10.244.0.0/33\nFLANNEL_SUBNET=10.244.1.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n",
        "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.1.1\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n",
        "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.1.1/24\nFLANNEL_MTU=-1\nFLANNEL_IPMASQ=true\n",
        "FLANNEL_NETWORK=\"10.244.0.0/16\"\nFLANNEL_SUBNET=10.244.1.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n",
        " FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.1.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n",
    ] {
        for plugin in [theirs(), ours()] {
            let done = Place::new(plugin.clone(), env).call("ADD", &conf(&json!({})));
            assert!(!done.succeeded, "{} takes {env:?}", plugin.display());
            assert_eq!(done.delegated, None);
            // A general failure.
            assert_eq!(done.result["code"], 999, "{done:?}");
        }
    }
}
