//! What CNI plugins have left in the result cache of the container runtime.

use std::{
    collections::BTreeMap,
    fs,
    io::Read as _,
    path::{Path, PathBuf},
    time::SystemTime,
};

use flannel_core::pods::cni::{self, CniPod};

/// Where libcni keeps results below the cache directory, now and in older versions.
const RESULTS: [&str; 2] = ["results", "cache/results"];
/// Longer files are nobody's: a result has a few hundred bytes.
const MAX_LEN: u64 = 1 << 20;

/// The files, read once each.
#[derive(Debug)]
pub(super) struct CniCache {
    dirs: Vec<PathBuf>,
    files: BTreeMap<PathBuf, File>,
}

#[derive(Debug)]
struct File {
    changed: (Option<SystemTime>, u64),
    pods: Vec<CniPod>,
}

impl CniCache {
    pub(super) fn new(dir: &Path) -> Self {
        Self {
            dirs: RESULTS.iter().map(|below| dir.join(below)).collect(),
            files: BTreeMap::new(),
        }
    }

    /// Everything in the cache. Files that were there before and have not changed are not read again. What cannot be read is as good as
    /// absent: the bridge will hear of the pod.
    pub(super) fn pods(&mut self) -> Vec<CniPod> {
        let mut before = std::mem::take(&mut self.files);
        for dir in &self.dirs {
            for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
                let (path, Ok(meta)) = (entry.path(), entry.metadata()) else {
                    continue;
                };
                if !meta.is_file() || meta.len() > MAX_LEN {
                    continue;
                }
                let changed = (meta.modified().ok(), meta.len());
                let file = before
                    .remove(&path)
                    .filter(|file| file.changed == changed)
                    .unwrap_or_else(|| File {
                        changed,
                        pods: read(&path),
                    });
                self.files.insert(path, file);
            }
        }
        let pods = self.files.values().flat_map(|file| &file.pods);
        pods.cloned().collect()
    }
}

fn read(path: &Path) -> Vec<CniPod> {
    let mut text = String::new();
    match fs::File::open(path).and_then(|file| file.take(MAX_LEN).read_to_string(&mut text)) {
        Ok(_length) => cni::parse(&text),
        Err(error) => {
            tracing::debug!(path = %path.display(), %error, "read a CNI result");
            Vec::new()
        }
    }
}
