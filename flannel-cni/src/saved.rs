//! What every container's delegate was given: `<dataDir>/<containerID>`, which DEL needs (upstream: `saveScratchNetConf`).
//!
//! Upstream's plugin reads our files and we read its.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use crate::{
    call,
    error::{CniError, IO_FAILURE},
};

/// The directory of saved configurations.
#[derive(Clone, Debug)]
pub(crate) struct Saved {
    dir: PathBuf,
}

impl Saved {
    pub(crate) fn new(dir: &Path) -> Self {
        Self {
            dir: dir.to_owned(),
        }
    }

    /// The file of a container. Its name was checked to be one ([`call::is_name`]).
    pub(crate) fn path(&self, container: &str) -> PathBuf {
        self.dir.join(container)
    }

    pub(crate) fn exists(&self, container: &str) -> bool {
        self.path(container).exists()
    }

    /// Saves a configuration so that after a crash there is the whole of it or what was there before.
    pub(crate) fn put(&self, container: &str, text: &str) -> Result<(), CniError> {
        let path = self.path(container);
        self.write(&path, container, text)
            .map_err(|error| CniError::new(IO_FAILURE, format!("save {}: {error}", path.display())))
    }

    fn write(&self, path: &Path, container: &str, text: &str) -> io::Result<()> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.dir)?;
        // No container has such a name.
        let scratch = self
            .dir
            .join(format!(".{container}.{}", std::process::id()));
        let written = write_new(&scratch, text).and_then(|()| fs::rename(&scratch, path));
        if let Err(error) = written {
            let _absent = fs::remove_file(&scratch);
            return Err(error);
        }
        File::open(&self.dir)?.sync_all()
    }

    /// What was saved; `None` if nothing was.
    pub(crate) fn get(&self, container: &str) -> Result<Option<String>, CniError> {
        let path = self.path(container);
        match fs::read(&path) {
            Ok(bytes) => Ok(Some(String::from_utf8_lossy(&bytes).into_owned())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(CniError::new(
                IO_FAILURE,
                format!("read {}: {error}", path.display()),
            )),
        }
    }

    /// Forgets a container.
    pub(crate) fn remove(&self, container: &str) -> Result<(), CniError> {
        let path = self.path(container);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(CniError::new(
                IO_FAILURE,
                format!("remove {}: {error}", path.display()),
            )),
            _ => Ok(()),
        }
    }

    /// The containers of which something is saved, in order.
    pub(crate) fn containers(&self) -> Result<Vec<String>, CniError> {
        let list = || -> io::Result<Vec<String>> {
            let mut names = Vec::new();
            for entry in fs::read_dir(&self.dir)? {
                let entry = entry?;
                let name = entry.file_name().to_string_lossy().into_owned();
                if call::is_name(&name) && entry.file_type()?.is_file() {
                    names.push(name);
                }
            }
            names.sort();
            Ok(names)
        };
        match list() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            list => list.map_err(|error| {
                CniError::new(IO_FAILURE, format!("list {}: {error}", self.dir.display()))
            }),
        }
    }
}

fn write_new(path: &Path, text: &str) -> io::Result<()> {
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn a_file_is_private_and_whole() {
        let dir = tempfile::tempdir().unwrap();
        let saved = Saved::new(&dir.path().join("a/flannel"));
        assert_eq!(saved.containers(), Ok(vec![]));
        assert_eq!(saved.get("c1"), Ok(None));
        saved.put("c1", "{\"a\":1}").unwrap();
        saved.put("c1", "{}").unwrap();
        assert_eq!(saved.get("c1"), Ok(Some("{}".into())));
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&saved.path("c1")), 0o600);
        assert_eq!(mode(&saved.dir), 0o700);
        fs::write(saved.dir.join(".c2.77"), "{").unwrap();
        fs::create_dir(saved.dir.join("c3")).unwrap();
        assert_eq!(saved.containers(), Ok(vec!["c1".to_owned()]));
        assert!(saved.exists("c1"));
        saved.remove("c1").unwrap();
        saved.remove("c1").unwrap();
        assert!(!saved.exists("c1"));
    }

    #[test]
    fn what_cannot_be_written_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let saved = Saved::new(dir.path());
        fs::create_dir(dir.path().join("c1")).unwrap();
        let error = saved.put("c1", "{}").unwrap_err();
        assert_eq!(error.code, IO_FAILURE);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        assert_eq!(saved.get("c1").unwrap_err().code, IO_FAILURE);
    }
}
