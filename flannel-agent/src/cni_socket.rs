//! The socket at which the CNI plugin says which pods come and go (`flannel_core::pods::report`).
//!
//! It is only ever a reason to look sooner: what was said is believed as far as the kernel shows it, and a node whose plugin says nothing,
//! such as upstream's, learns its pods all the same.

mod server;

use std::{
    fs, io,
    os::unix::{
        fs::{FileTypeExt as _, PermissionsExt as _},
        net::UnixStream,
    },
    path::{Path, PathBuf},
};

use flannel_core::pods::report::{self, Answer, Report};
use thiserror::Error;
use tokio::{
    net::UnixListener,
    sync::{mpsc, oneshot},
};
use tokio_util::sync::CancellationToken;

use crate::{
    health::{Board, Lacking, NOT_YET, Part},
    telemetry::chain,
};

/// Calls that may wait while the loop is busy.
const BACKLOG: usize = 64;

/// A pod that comes or goes, and who waits to hear what has come of it.
#[derive(Debug)]
pub(crate) struct Call {
    pub(crate) news: News,
    pub(crate) answer: oneshot::Sender<Answer>,
}

/// Which of the two.
#[derive(Clone, Debug)]
pub(crate) enum News {
    Come(Report),
    Go(Report),
}

/// Why there is no socket.
#[derive(Debug, Error)]
enum SocketError {
    #[error("{0} is not a socket: choose another place with --cni-socket")]
    NoSocket(PathBuf),
    #[error("another agent listens on {0}: choose another place with --cni-socket")]
    Taken(PathBuf),
    #[error("listen on {path}: {source}")]
    Listen { path: PathBuf, source: io::Error },
}

/// Where the socket is unless a flag says otherwise.
pub(crate) fn beside(subnet_file: &Path) -> PathBuf {
    subnet_file.with_file_name(report::SOCKET)
}

/// Serves the socket in the background until cancelled. Without one everything works, so that trouble is only said.
pub(crate) fn serve(path: &Path, board: Board, cancel: CancellationToken) -> mpsc::Receiver<Call> {
    let (calls, incoming) = mpsc::channel(BACKLOG);
    match listen(path) {
        Ok(listener) => {
            tracing::info!(socket = %path.display(), "listening for the CNI plugin");
            tokio::spawn(server::serve(listener, board, calls, cancel));
        }
        Err(error) => tracing::warn!(
            "{}; pods come to the fast path a moment after they were made",
            chain(&error)
        ),
    }
    incoming
}

/// Removes the socket of an agent that does not run any more.
pub(crate) fn remove(path: &Path) -> io::Result<()> {
    if is_socket(path) && !is_alive(path) {
        fs::remove_file(path)?;
    }
    Ok(())
}

/// Whether there is a socket that [`remove`] would remove.
pub(crate) fn is_stale(path: &Path) -> bool {
    is_socket(path) && !is_alive(path)
}

fn listen(path: &Path) -> Result<UnixListener, SocketError> {
    if fs::symlink_metadata(path).is_ok() {
        if !is_socket(path) {
            return Err(SocketError::NoSocket(path.to_owned()));
        }
        if is_alive(path) {
            return Err(SocketError::Taken(path.to_owned()));
        }
    }
    // In place only when nobody but us may use it.
    let scratch = path.with_extension(std::process::id().to_string());
    let listen = || -> io::Result<UnixListener> {
        if let Some(dir) = path.parent() {
            fs::create_dir_all(dir)?;
        }
        match fs::remove_file(&scratch) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(&scratch)?;
        fs::set_permissions(&scratch, fs::Permissions::from_mode(0o600))?;
        fs::rename(&scratch, path)?;
        Ok(listener)
    };
    listen().map_err(|source| {
        let _absent = fs::remove_file(&scratch);
        SocketError::Listen {
            path: path.to_owned(),
            source,
        }
    })
}

/// Why no pod can be added. While the agent starts, what an earlier run has left serves: a node must not lose its pods' readiness over an
/// upgrade. Without an earlier run there is no `subnet.env`, which the plugin sees by itself.
fn obstacle(lacking: &Lacking) -> Option<String> {
    if lacking.get(&Part::SubnetFile).map(String::as_str) == Some(NOT_YET) {
        return None;
    }
    [Part::Datapath, Part::SubnetFile]
        .into_iter()
        .find_map(|part| Some(format!("{}: {}", part.as_str(), lacking.get(&part)?)))
}

fn is_socket(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|meta| meta.file_type().is_socket())
}

/// Whether somebody listens. The socket of a process that has ended refuses.
fn is_alive(path: &Path) -> bool {
    match UnixStream::connect(path) {
        Ok(_) => true,
        Err(error) => !matches!(
            error.kind(),
            io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound
        ),
    }
}

#[cfg(test)]
mod tests;
