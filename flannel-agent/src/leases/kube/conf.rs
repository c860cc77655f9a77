//! The network configuration: a file that Kubernetes mounts from a ConfigMap, and swaps as a whole by a symbolic link.

use std::{path::Path, time::Duration};

use crate::leases::{LeaseError, conf_file};

/// How often the file is read without being told of a change.
const RESCAN: Duration = Duration::from_secs(10);

/// Reads the file.
pub(super) async fn read(path: &Path) -> Result<String, LeaseError> {
    tokio::fs::read_to_string(path).await.map_err(|source| {
        if source.kind() == std::io::ErrorKind::InvalidData {
            LeaseError::NetConfText {
                location: path.display().to_string(),
            }
        } else {
            LeaseError::KubeNetConf {
                path: path.to_owned(),
                source,
            }
        }
    })
}

/// Waits for another text in it.
pub(super) async fn after(path: &Path, known: &str) -> String {
    // The link `..data` is beside it.
    let dir = path.parent().unwrap_or(Path::new("."));
    conf_file::after(&[dir], RESCAN, || read(path), known).await
}
