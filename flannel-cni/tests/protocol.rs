//! The plugin as a program, with a delegate that writes down what it is told. Needs no privilege.

use std::{
    fs,
    io::Write as _,
    os::unix::net::UnixListener,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use flannel_testkit::put_program;
use serde_json::{Value, json};

const ENV: &str = "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.1.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n";
const RESULT: &str = r#"{"cniVersion":"1.1.0","ips":[{"address":"10.244.1.2/24"}]}"#;

/// Directories of a test, and a delegate `bridge` that appends its command, its variables and its input to `log` and does as the file
/// `answer.<COMMAND>` says.
struct Desk {
    dir: tempfile::TempDir,
}

impl Desk {
    fn new() -> Desk {
        let desk = Desk {
            dir: tempfile::tempdir().unwrap(),
        };
        let bridge = desk.path("bridge");
        let script = format!(
            "#!/bin/sh\ncd {}\nconf=$(cat)\necho \"$CNI_COMMAND|$CNI_CONTAINERID|$CNI_IFNAME|$CNI_NETNS|$CNI_ARGS|$conf\" >> log\n\
             echo \"bridge: $CNI_COMMAND\" >&2\ntest -e answer.$CNI_COMMAND || exit 0\ncat answer.$CNI_COMMAND\n! grep -q '\"code\"' answer.$CNI_COMMAND\n",
            desk.dir.path().display()
        );
        put_program(&bridge, script);
        fs::write(desk.path("subnet.env"), ENV).unwrap();
        desk.answer("ADD", RESULT);
        desk.answer(
            "VERSION",
            r#"{"cniVersion":"1.1.0","supportedVersions":["1.0.0","1.1.0"]}"#,
        );
        desk
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn answer(&self, command: &str, text: &str) {
        fs::write(self.path(&format!("answer.{command}")), text).unwrap();
    }

    fn conf(&self) -> Value {
        json!({
            "name": "cbr0", "type": "flannel", "cniVersion": "1.1.0",
            "subnetFile": self.path("subnet.env"), "dataDir": self.path("data"),
            "ipam": { "dataDir": self.path("networks") },
        })
    }

    fn run(&self, command: &str, conf: &Value) -> Output {
        self.run_with(&[("CNI_COMMAND", command)], conf.to_string().as_bytes())
    }

    fn run_with(&self, variables: &[(&str, &str)], input: &[u8]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_flannel"));
        command
            .env("CNI_CONTAINERID", "c1")
            .env("CNI_IFNAME", "eth0")
            .env("CNI_NETNS", "/run/netns/nobody")
            .env("CNI_ARGS", "IgnoreUnknown=1")
            .env(
                "CNI_PATH",
                format!("/nonexistent:{}", self.dir.path().display()),
            )
            .envs(variables.iter().copied())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        // It may have refused before it read anything.
        let _gone = child.stdin.take().unwrap().write_all(input);
        child.wait_with_output().unwrap()
    }

    /// What the delegate was told since the last time, without VERSION.
    fn log(&self) -> Vec<Vec<String>> {
        let text = fs::read_to_string(self.path("log")).unwrap_or_default();
        let _absent = fs::remove_file(self.path("log"));
        let lines = text.lines().filter(|line| !line.starts_with("VERSION|"));
        lines
            .map(|line| line.splitn(6, '|').map(str::to_owned).collect())
            .collect()
    }

    fn saved(&self) -> PathBuf {
        self.path("data/c1")
    }
}

#[track_caller]
fn ok(output: &Output) -> String {
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout.clone()).unwrap()
}

#[track_caller]
fn failed(output: &Output) -> (u64, String) {
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let error: Value = serde_json::from_slice(&output.stdout).unwrap();
    (
        error["code"].as_u64().unwrap(),
        error["msg"].as_str().unwrap().to_owned(),
    )
}

#[test]
fn without_a_command_it_says_what_it_is() {
    let output = Command::new(env!("CARGO_BIN_EXE_flannel"))
        .env_remove("CNI_COMMAND")
        .output()
        .unwrap();
    assert_eq!(ok(&output), "");
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.starts_with("CNI Plugin flannel version v"), "{said}");
    assert!(
        said.ends_with(
            "\nCNI protocol versions supported: 0.1.0, 0.2.0, 0.3.0, 0.3.1, 0.4.0, 1.0.0, 1.1.0\n"
        ),
        "{said}"
    );
    let output = Desk::new().run_with(&[("CNI_COMMAND", "VERSION")], b"not read");
    assert!(ok(&output).contains(r#""supportedVersions":["0.1.0","#));
}

#[test]
fn what_the_runtime_says_is_passed_on() {
    let desk = Desk::new();
    let output = desk.run("ADD", &desk.conf());
    assert_eq!(ok(&output), RESULT);
    let said = String::from_utf8(output.stderr).unwrap();
    let saved = fs::read_to_string(desk.saved()).unwrap();
    assert_eq!(
        said,
        format!("delegateAdd: netconf sent to delegate plugin:\n{saved}\nbridge: ADD\n")
    );
    assert_eq!(
        desk.log(),
        [[
            "ADD",
            "c1",
            "eth0",
            "/run/netns/nobody",
            "IgnoreUnknown=1",
            &saved
        ]]
    );

    let mut conf = desk.conf();
    conf["prevResult"] = json!({ "cniVersion": "1.1.0", "ips": [{ "address": "10.244.1.2/24", "gateway": "10.244.1.1" }],
        "routes": [{ "dst": "10.244.0.0/16" }] });
    ok(&desk.run("CHECK", &conf));
    let log = desk.log();
    let checked: Value = serde_json::from_str(&log[0][5]).unwrap();
    assert_eq!(
        checked["prevResult"]["routes"][0],
        json!({ "dst": "10.244.0.0/16", "gw": "10.244.1.1" })
    );
    assert_eq!(checked["ipam"]["type"], "host-local");

    ok(&desk.run("DEL", &conf));
    assert_eq!(
        desk.log(),
        [[
            "DEL",
            "c1",
            "eth0",
            "/run/netns/nobody",
            "IgnoreUnknown=1",
            &saved
        ]]
    );
    assert!(!desk.saved().exists());
    ok(&desk.run("DEL", &conf));
    assert!(desk.log().is_empty());
}

#[test]
fn errors_have_upstreams_words() {
    let desk = Desk::new();
    let file = desk.path("subnet.env").display().to_string();
    let advice = "Check the flannel pod log for this node.";
    fs::write(desk.path("subnet.env"), "FLANNEL_MTU\n").unwrap();
    let (code, said) = failed(&desk.run("ADD", &desk.conf()));
    assert_eq!(code, 999);
    assert_eq!(
        said,
        format!(
            "failed to load flannel 'subnet.env' file: FLANNEL_MTU has no value: write FLANNEL_MTU=…. {advice}"
        )
    );
    fs::write(desk.path("subnet.env"), "FLANNEL_MTU=1450\n").unwrap();
    let (_, said) = failed(&desk.run("ADD", &desk.conf()));
    assert_eq!(
        said,
        format!(
            "failed to load flannel 'subnet.env' file: {file} is missing FLANNEL_NETWORK, FLANNEL_IPV6_NETWORK, FLANNEL_SUBNET, FLANNEL_IPV6_SUBNET, FLANNEL_IPMASQ. {advice}"
        )
    );
    fs::remove_file(desk.path("subnet.env")).unwrap();
    let missing = format!(
        "failed to load flannel 'subnet.env' file: open {file}: no such file or directory. {advice}"
    );
    assert_eq!(
        failed(&desk.run("ADD", &desk.conf())),
        (999, missing.clone())
    );
    assert_eq!(failed(&desk.run("STATUS", &desk.conf())), (50, missing));
    fs::write(desk.path("subnet.env"), ENV).unwrap();

    let mut conf = desk.conf();
    conf["delegate"] = json!({ "type": "nobody" });
    let (code, said) = failed(&desk.run("ADD", &conf));
    assert_eq!(
        (code, said),
        (
            999,
            format!(
                "failed to find plugin \"nobody\" in path [/nonexistent {}]",
                desk.dir.path().display()
            )
        )
    );
    conf["cniVersion"] = json!("0.3.1");
    for command in ["CHECK", "GC", "STATUS"] {
        assert_eq!(
            failed(&desk.run(command, &conf)),
            (1, format!("config version does not allow {command}"))
        );
    }
    conf["cniVersion"] = json!("7.0.0");
    assert_eq!(
        failed(&desk.run("ADD", &conf)),
        (1, "incompatible CNI versions".into())
    );
    let own = desk.run_with(
        &[("CNI_COMMAND", "ADD"), ("CNI_NETNS", "/proc/self/ns/net")],
        desk.conf().to_string().as_bytes(),
    );
    assert_eq!(
        failed(&own),
        (
            8,
            "plugin's netns and netns from CNI_NETNS should not be the same".into()
        )
    );
    for id in ["../../etc/passwd", "..", "a/b"] {
        let output = desk.run_with(
            &[("CNI_COMMAND", "DEL"), ("CNI_CONTAINERID", id)],
            desk.conf().to_string().as_bytes(),
        );
        assert_eq!(
            failed(&output),
            (4, "invalid characters in containerID".into())
        );
    }
    assert_eq!(failed(&desk.run_with(&[("CNI_COMMAND", "ADD")], b"{")).0, 6);
    assert!(desk.log().is_empty());
}

#[test]
fn a_failed_addition_is_undone_or_left_to_the_runtime() {
    let desk = Desk::new();
    desk.answer("ADD", r#"{"code":11,"msg":"busy","details":"later"}"#);
    assert_eq!(failed(&desk.run("ADD", &desk.conf())), (11, "busy".into()));
    let commands = |desk: &Desk| -> Vec<String> {
        desk.log().into_iter().map(|call| call[0].clone()).collect()
    };
    assert_eq!(commands(&desk), ["ADD", "DEL"]);
    assert!(!desk.saved().exists());
    // It cannot be undone either: what DEL needs stays.
    desk.answer("DEL", r#"{"code":5,"msg":"no disk"}"#);
    assert_eq!(failed(&desk.run("ADD", &desk.conf())).0, 11);
    assert_eq!(commands(&desk), ["ADD", "DEL"]);
    assert!(desk.saved().exists());
    // A repetition of what may have worked before is not undone.
    fs::remove_file(desk.path("answer.DEL")).unwrap();
    assert_eq!(failed(&desk.run("ADD", &desk.conf())).0, 11);
    assert_eq!(commands(&desk), ["ADD"]);
    ok(&desk.run("DEL", &desk.conf()));
    assert_eq!(commands(&desk), ["DEL"]);
    assert!(!desk.saved().exists());
    // Words without JSON reach the runtime too.
    desk.answer("ADD", "\"code\" red");
    let (code, said) = failed(&desk.run("ADD", &desk.conf()));
    assert_eq!(code, 999);
    assert!(
        said.starts_with(
            "netplugin failed but error parsing its diagnostic message \"\\\"code\\\" red\""
        ),
        "{said}"
    );
}

#[test]
fn a_delegate_that_knows_gc_and_status_is_asked() {
    let desk = Desk::new();
    ok(&desk.run("ADD", &desk.conf()));
    desk.log();
    let mut conf = desk.conf();
    conf["cni.dev/valid-attachments"] = json!([{ "containerID": "c1", "ifname": "eth0" }]);
    ok(&desk.run("GC", &conf));
    let log = desk.log();
    assert_eq!(log.len(), 1, "{log:?}");
    assert_eq!(log[0][0], "GC");
    let told: Value = serde_json::from_str(&log[0][5]).unwrap();
    assert_eq!(
        told["cni.dev/valid-attachments"],
        conf["cni.dev/valid-attachments"]
    );
    assert_eq!(
        (&told["name"], &told["cniVersion"]),
        (&json!("cbr0"), &json!("1.1.0"))
    );
    // c1 goes, and so does an address of a container that nobody knows.
    let net = desk.path("networks/cbr0");
    fs::create_dir_all(&net).unwrap();
    fs::write(net.join("10.244.1.9"), "lost\r\nnet1").unwrap();
    conf["cni.dev/valid-attachments"] = json!([]);
    ok(&desk.run("GC", &conf));
    let log = desk.log();
    let calls: Vec<_> = log.iter().map(|call| call[..4].join(" ")).collect();
    assert_eq!(
        calls,
        [
            "DEL c1 eth0 ",
            "DEL lost net1 ",
            "GC c1 eth0 /run/netns/nobody"
        ]
    );
    assert!(!desk.saved().exists());

    ok(&desk.run("STATUS", &desk.conf()));
    let log = desk.log();
    assert_eq!((log.len(), log[0][0].as_str()), (1, "STATUS"));
    desk.answer("STATUS", r#"{"code":51,"msg":"limited"}"#);
    assert_eq!(
        failed(&desk.run("STATUS", &desk.conf())),
        (51, "limited".into())
    );
    // One that does not know it is not asked.
    desk.answer(
        "VERSION",
        r#"{"cniVersion":"1.0.0","supportedVersions":["1.0.0"]}"#,
    );
    desk.log();
    ok(&desk.run("STATUS", &desk.conf()));
    conf["cni.dev/valid-attachments"] = json!([{ "containerID": "lost", "ifname": "net1" }]);
    ok(&desk.run("GC", &conf));
    assert!(desk.log().is_empty());
}

#[test]
fn an_agent_that_is_not_ready_says_why() {
    let desk = Desk::new();
    let socket = desk.path("cni.sock");
    let answer = |text: &str| {
        let _absent = fs::remove_file(&socket);
        serve(&socket, text)
    };
    let agent =
        answer("{\"version\":1,\"state\":\"notready\",\"reason\":\"datapath: no device\"}\n");
    assert_eq!(
        failed(&desk.run("STATUS", &desk.conf())),
        (50, "flannel is not ready: datapath: no device".into())
    );
    assert_eq!(
        agent.join().unwrap(),
        "{\"version\":1,\"command\":\"status\"}\n"
    );
    let agent = answer("{\"version\":1,\"state\":\"ready\"}\n");
    ok(&desk.run("STATUS", &desk.conf()));
    agent.join().unwrap();
    // An agent that hangs up, and one that is gone.
    let agent = answer("");
    ok(&desk.run("STATUS", &desk.conf()));
    agent.join().unwrap();
    ok(&desk.run("STATUS", &desk.conf()));
}

fn serve(socket: &Path, answer: &str) -> std::thread::JoinHandle<String> {
    let (listener, answer) = (UnixListener::bind(socket).unwrap(), answer.to_owned());
    std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut line = String::new();
        let mut reader = std::io::BufReader::new(stream.try_clone().unwrap());
        std::io::BufRead::read_line(&mut reader, &mut line).unwrap();
        stream.write_all(answer.as_bytes()).unwrap();
        line
    })
}
