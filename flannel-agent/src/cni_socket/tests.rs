use std::{
    io::{Read as _, Write as _},
    os::unix::net::UnixStream as Stream,
    time::Duration,
};

use flannel_core::pods::report::{MAX_LINE, Outcome};
use tokio::task::spawn_blocking;

use super::*;

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o777
}

#[tokio::test]
async fn a_dead_agents_socket_is_replaced_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("deep/cni.sock");
    let first = listen(&path).unwrap();
    assert_eq!(mode(&path), 0o600);
    assert!(matches!(listen(&path), Err(SocketError::Taken(_))));
    assert!(!is_stale(&path));
    remove(&path).unwrap();
    assert!(path.exists(), "of an agent that runs");
    drop(first);
    assert!(is_stale(&path));
    let again = listen(&path).unwrap();
    assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
    drop(again);
    remove(&path).unwrap();
    assert!(!path.exists());
    fs::write(&path, "mine").unwrap();
    assert!(matches!(listen(&path), Err(SocketError::NoSocket(_))));
    remove(&path).unwrap();
    assert_eq!(fs::read_to_string(&path).unwrap(), "mine");
}

#[test]
fn a_starting_agent_is_no_obstacle() {
    let lacking = |parts: &[(Part, &str)]| -> Lacking {
        parts
            .iter()
            .map(|(part, why)| (*part, (*why).to_owned()))
            .collect()
    };
    let all = Part::ALL.map(|part| (part, NOT_YET));
    assert_eq!(obstacle(&lacking(&all)), None);
    assert_eq!(obstacle(&lacking(&[(Part::Firewall, "x")])), None);
    assert_eq!(
        obstacle(&lacking(&[(Part::Datapath, "no device")])),
        Some("datapath: no device".into())
    );
    assert_eq!(
        obstacle(&lacking(&[(Part::SubnetFile, "no room")])),
        Some("subnet-file: no room".into())
    );
}

/// Sends bytes, and gives what comes back until the connection ends.
fn ask(path: &Path, bytes: &[u8]) -> String {
    let mut stream = Stream::connect(path).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    // Who says too much is not listened to, and may be cut off.
    let _cut = stream.write_all(bytes);
    let mut answer = String::new();
    let _cut = stream.read_to_string(&mut answer);
    answer
}

#[tokio::test]
async fn bad_clients_cost_only_themselves() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("cni.sock");
    let board = Board::default();
    let cancel = CancellationToken::new();
    let mut calls = serve(&path, board.clone(), cancel.clone());
    // More than are served at a time, and all of them silent.
    let silent: Vec<Stream> = (0..200).map(|_| Stream::connect(&path).unwrap()).collect();
    let at = path.clone();
    let answers = spawn_blocking(move || {
        let long = [&vec![b' '; 2 * MAX_LINE][..], b"{}\n"].concat();
        [
            ask(&at, b"{\"version\":1,\"command\":\"status\"}\n"),
            ask(&at, b"{\"version\":9,\"command\":\"status\"}\n"),
            ask(&at, b"\xff\xfe\n"),
            ask(&at, &long),
        ]
    });
    let [status, version, garbage, long] = answers.await.unwrap();
    assert_eq!(status, "{\"version\":1,\"state\":\"ready\"}\n");
    assert!(version.contains("version 9 is not known"), "{version}");
    assert!(garbage.contains("\"state\":\"error\""), "{garbage}");
    assert!(!long.contains("\"state\":\"ready\""), "{long}");
    drop(silent);

    // A pod is answered by the loop; and if that does not, the plugin must go on all the same.
    let pod = br#"{"version":1,"command":"add","container":"a","ifname":"eth0","pods":[]}"#;
    let line = [&pod[..], b"\n"].concat();
    let (at, text) = (path.clone(), line.clone());
    let asked = spawn_blocking(move || ask(&at, &text));
    let call = calls.recv().await.unwrap();
    assert!(matches!(&call.news, News::Come(report) if report.container == "a"));
    call.answer.send(Answer::new(Outcome::Carried, "")).unwrap();
    assert_eq!(
        asked.await.unwrap(),
        "{\"version\":1,\"state\":\"carried\"}\n"
    );
    let (at, text) = (path.clone(), line.clone());
    let asked = spawn_blocking(move || ask(&at, &text));
    let unanswered = calls.recv().await.unwrap();
    assert!(asked.await.unwrap().contains("\"state\":\"stack\""));
    drop(unanswered);
    drop(calls);
    let asked = spawn_blocking(move || ask(&path, &line));
    assert!(asked.await.unwrap().contains("the agent is being set up"));
    cancel.cancel();
}
