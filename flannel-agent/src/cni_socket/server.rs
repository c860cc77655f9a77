//! Answering at the socket. Clients that are slow, many or mad must cost nothing but themselves.

use std::{sync::Arc, time::Duration};

use flannel_core::pods::report::{self, Answer, MAX_LINE, Outcome, Word};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::{UnixListener, UnixStream},
    sync::{Semaphore, mpsc, oneshot},
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use super::{Call, News};
use crate::health::Board;

/// Connections at a time; others wait in the kernel's queue.
const CONNECTIONS: usize = 128;
/// How long a client may take for its line, and for taking the answer.
const LINE: Duration = Duration::from_millis(500);
/// How long a pod may take to get to the fast path before its plugin is told to go on: less than the plugin waits.
const PATIENCE: Duration = Duration::from_millis(900);
/// How long to rest when the process has no descriptors left.
const REST: Duration = Duration::from_millis(100);

/// Serves until cancelled.
pub(super) async fn serve(
    listener: UnixListener,
    board: Board,
    calls: mpsc::Sender<Call>,
    cancel: CancellationToken,
) {
    let permits = Arc::new(Semaphore::new(CONNECTIONS));
    let accept = async {
        loop {
            let Ok(permit) = Arc::clone(&permits).acquire_owned().await else {
                return;
            };
            match listener.accept().await {
                Ok((stream, _)) => {
                    let (board, calls) = (board.clone(), calls.clone());
                    tokio::spawn(async move {
                        converse(stream, &board, &calls).await;
                        drop(permit);
                    });
                }
                Err(error) => {
                    tracing::debug!(%error, "accept a connection of the CNI plugin");
                    sleep(REST).await;
                }
            }
        }
    };
    cancel.run_until_cancelled(accept).await;
}

/// One question, one answer.
async fn converse(mut stream: UnixStream, board: &Board, calls: &mpsc::Sender<Call>) {
    let mut line = Vec::new();
    let read = async {
        let mut bounded = BufReader::new((&mut stream).take(MAX_LINE as u64));
        bounded.read_until(b'\n', &mut line).await
    };
    if !matches!(timeout(LINE, read).await, Ok(Ok(1..))) {
        return;
    }
    let answer = match report::parse(&line) {
        Ok(word) => answer(word, board, calls).await,
        Err(refusal) => refusal,
    };
    let Ok(mut text) = serde_json::to_vec(&answer) else {
        return;
    };
    text.push(b'\n');
    // Who has gone away does not want to know.
    let _gone = timeout(LINE, stream.write_all(&text)).await;
}

async fn answer(word: Word, board: &Board, calls: &mpsc::Sender<Call>) -> Answer {
    let news = match word {
        Word::Status => return status(board),
        Word::Add(report) => News::Come(report),
        Word::Del(report) => News::Go(report),
    };
    let (answer, answered) = oneshot::channel();
    let call = async {
        calls.send(Call { news, answer }).await.ok()?;
        answered.await.ok()
    };
    match timeout(PATIENCE, call).await {
        Ok(Some(answer)) => answer,
        Ok(None) => Answer::new(Outcome::Stack, "the agent is being set up"),
        Err(_elapsed) => Answer::new(
            Outcome::Stack,
            format!("not on the fast path within {PATIENCE:?}"),
        ),
    }
}

/// Pods can be added once the node was set up: a store that does not answer at the moment is no reason against it.
fn status(board: &Board) -> Answer {
    let lacking = board.watch();
    let lacking = lacking.borrow();
    match super::obstacle(&lacking) {
        None => Answer::new(Outcome::Ready, ""),
        Some(reason) => Answer::new(Outcome::NotReady, reason),
    }
}
