//! Telling the agent about pods. Without an agent that listens everything works as well, and the agent finds the pods by itself.

use std::{
    io::{self, Read as _, Write as _},
    os::unix::net::UnixStream,
    path::Path,
    time::{Duration, Instant},
};

use flannel_core::pods::report::{Answer, MAX_LINE, Outcome, Request, Word};

use crate::complain;

/// How long the agent may take.
const PATIENCE: Duration = Duration::from_secs(1);

/// Says a word and waits, a little, for the answer. `None` if nobody listens or answers.
pub(crate) fn tell(socket: &Path, word: Word) -> Option<Answer> {
    match ask(socket, word) {
        Ok(answer) => {
            if answer.state == Outcome::Error {
                complain(&format!("the agent does not understand: {}", answer.reason));
                return None;
            }
            Some(answer)
        }
        // An agent that has no socket, or none that runs.
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
            ) =>
        {
            None
        }
        Err(error) => {
            complain(&format!("tell the agent at {}: {error}", socket.display()));
            None
        }
    }
}

fn ask(socket: &Path, word: Word) -> io::Result<Answer> {
    let end = Instant::now() + PATIENCE;
    let mut line = serde_json::to_vec(&Request::new(word))?;
    line.push(b'\n');
    let mut stream = UnixStream::connect(socket)?;
    stream.set_write_timeout(Some(PATIENCE))?;
    stream.write_all(&line)?;
    let mut answer = Vec::new();
    let mut piece = [0; 1024];
    while !answer.contains(&b'\n') && answer.len() < MAX_LINE {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        stream.set_read_timeout(Some(left))?;
        let length = stream.read(&mut piece)?;
        if length == 0 {
            break;
        }
        answer.extend_from_slice(piece.get(..length).unwrap_or_default());
    }
    Ok(serde_json::from_slice(&answer)?)
}

#[cfg(test)]
mod tests {
    use std::{
        io::{BufRead as _, BufReader},
        os::unix::net::UnixListener,
        thread,
    };

    use super::*;

    #[test]
    fn without_an_agent_nothing_is_lost() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("cni.sock");
        assert_eq!(tell(&path, Word::Status), None);
        drop(UnixListener::bind(&path).unwrap());
        assert_eq!(tell(&path, Word::Status), None);
    }

    #[test]
    fn an_answer_in_pieces_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("cni.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let agent = thread::spawn(move || {
            for answer in [
                &b"{\"version\":1,\"state\":\"ready\"}\n"[..],
                b"{\"version\":1,\"state\":\"error\",\"reason\":\"x\"}\n",
                b"",
                b"nonsense\n",
            ] {
                let (mut stream, _) = listener.accept().unwrap();
                let mut line = String::new();
                BufReader::new(stream.try_clone().unwrap())
                    .read_line(&mut line)
                    .unwrap();
                assert_eq!(line, "{\"version\":1,\"command\":\"status\"}\n");
                for piece in answer.chunks(10) {
                    stream.write_all(piece).unwrap();
                }
            }
        });
        assert_eq!(
            tell(&path, Word::Status),
            Some(Answer::new(Outcome::Ready, ""))
        );
        for _ in 0..3 {
            assert_eq!(tell(&path, Word::Status), None);
        }
        agent.join().unwrap();
    }
}
