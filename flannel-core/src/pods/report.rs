//! What the CNI plugin and the agent say to each other over the agent's socket: one line of JSON each, and the connection ends.
//!
//! It only makes the agent look sooner. What the plugin says is believed as far as the kernel says the same.

use serde::{Deserialize, Serialize};

use super::cni::CniPod;

/// The version of this protocol. Another one is answered with an error, and the plugin goes on without.
pub const VERSION: u32 = 1;
/// The longest line, in bytes.
pub const MAX_LINE: usize = 64 << 10;
/// The file name of the socket, beside `subnet.env`.
pub const SOCKET: &str = "cni.sock";

/// A question with its version.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// See [`VERSION`].
    pub version: u32,
    /// What is asked.
    #[serde(flatten)]
    pub word: Word,
}

/// What the plugin says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "lowercase")]
pub enum Word {
    /// A pod was made: answer when packets of it can be carried past the stack.
    Add(Report),
    /// A pod is about to go: answer when nothing is carried to it any more.
    Del(Report),
    /// Can a pod be added?
    Status,
}

/// About an interface of a container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// The container's id.
    pub container: String,
    /// The interface's name in the container.
    pub ifname: String,
    /// Its addresses, as far as they are known.
    #[serde(default)]
    pub pods: Vec<CniPod>,
}

/// What the agent says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// See [`VERSION`].
    pub version: u32,
    /// What has come of it.
    pub state: Outcome,
    /// Why, in words.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub reason: String,
}

/// What has come of a word.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// The pod is on the fast path.
    Carried,
    /// The pod is with the host's stack, and will stay there or come to the fast path later.
    Stack,
    /// Nothing is carried past the stack to the pod any more.
    Gone,
    /// Pods can be added.
    Ready,
    /// Pods cannot be added.
    NotReady,
    /// The question was not understood.
    Error,
}

impl Request {
    /// In this version.
    pub const fn new(word: Word) -> Self {
        Self {
            version: VERSION,
            word,
        }
    }
}

impl Answer {
    /// In this version.
    pub fn new(state: Outcome, reason: impl Into<String>) -> Self {
        Self {
            version: VERSION,
            state,
            reason: reason.into(),
        }
    }
}

/// Reads a request.
pub fn parse(line: &[u8]) -> Result<Word, Answer> {
    #[derive(Deserialize)]
    struct Versioned {
        version: u32,
    }
    let wrong = |reason: String| Answer::new(Outcome::Error, reason);
    let Versioned { version } = serde_json::from_slice(line).map_err(|e| wrong(e.to_string()))?;
    if version != VERSION {
        return Err(wrong(format!(
            "version {version} is not known, only {VERSION}"
        )));
    }
    let request: Request = serde_json::from_slice(line).map_err(|e| wrong(e.to_string()))?;
    Ok(request.word)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_wire_format_stays() {
        let report = Report {
            container: "4ab5".into(),
            ifname: "eth0".into(),
            pods: vec![CniPod {
                address: "10.244.1.7".parse().unwrap(),
                mac: "ae:8f:1b:0b:01:02".parse().unwrap(),
                host_interfaces: vec!["cni0".into(), "veth8b2d4c1e".into()],
            }],
        };
        let line = r#"{"version":1,"command":"add","container":"4ab5","ifname":"eth0","pods":[{"address":"10.244.1.7","mac":"ae:8f:1b:0b:01:02","hostInterfaces":["cni0","veth8b2d4c1e"]}]}"#;
        let word = Word::Add(report);
        assert_eq!(parse(line.as_bytes()), Ok(word.clone()));
        assert_eq!(serde_json::to_string(&Request::new(word)).unwrap(), line);
        assert_eq!(
            parse(br#"{"version":1,"command":"status"}"#),
            Ok(Word::Status)
        );
        assert_eq!(
            parse(br#"{"version":1,"command":"del","container":"a","ifname":"b"}"#),
            Ok(Word::Del(Report {
                container: "a".into(),
                ifname: "b".into(),
                pods: vec![]
            }))
        );
        let answer = serde_json::to_string(&Answer::new(Outcome::NotReady, "lease: lost"));
        assert_eq!(
            answer.unwrap(),
            r#"{"version":1,"state":"notready","reason":"lease: lost"}"#
        );
    }

    #[test]
    fn what_is_not_understood_is_answered() {
        for (line, said) in [
            ("", "EOF"),
            ("[]", "invalid"),
            ("{}", "missing field `version`"),
            (
                r#"{"version":2,"command":"x"}"#,
                "version 2 is not known, only 1",
            ),
            (r#"{"version":1}"#, "missing field `command`"),
            (r#"{"version":1,"command":"x"}"#, "unknown variant `x`"),
            (
                r#"{"version":1,"command":"add","container":"a","ifname":"b","pods":[{"address":"fd00::1/64"}]}"#,
                "invalid",
            ),
        ] {
            let answer = parse(line.as_bytes()).unwrap_err();
            assert_eq!(answer.state, Outcome::Error);
            assert!(answer.reason.contains(said), "{line}: {}", answer.reason);
        }
    }

    proptest! {
        #[test]
        fn never_panics(line: Vec<u8>) {
            let _word = parse(&line);
        }
    }
}
