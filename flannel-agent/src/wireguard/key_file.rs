//! The file of the private key: read, or made when it is missing. Never written over: peers know the public half.

use std::{
    env, fs,
    io::{self, Read as _, Write as _},
    os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

use flannel_core::{key::SecretKey, wireguard::private_from_random};
use thiserror::Error;

/// Where the key is (upstream: pkg/backend/wireguard).
const PATH: &str = "/run/flannel/wgkey";
/// The environment variable that names another file.
const VARIABLE: &str = "WIREGUARD_KEY_FILE";
/// More than a key has, and far less than a wrong file may have.
const LIMIT: u64 = 256;

/// A key file that cannot be used.
#[derive(Debug, Error)]
pub enum KeyFileError {
    /// It cannot be read or made.
    #[error("{action} the WireGuard key file {}: {source}: {VARIABLE} may name another", path.display())]
    Io {
        /// `read` or `make`.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// It has no key in it.
    #[error(
        "the WireGuard key file {} has no private key in it: write one as \"wg genkey\" prints it, or remove the file and a new key is made",
        path.display()
    )]
    NoKey {
        /// The file.
        path: PathBuf,
    },
}

/// Where this node's key is.
pub(crate) fn path() -> PathBuf {
    let named = env::var_os(VARIABLE).filter(|name| !name.is_empty());
    named.map_or_else(|| PATH.into(), PathBuf::from)
}

/// Reads the key, or makes one. `true` when it is new.
pub(super) fn obtain(path: &Path) -> Result<(SecretKey, bool), KeyFileError> {
    let failed = |action| {
        move |source| KeyFileError::Io {
            action,
            path: path.to_owned(),
            source,
        }
    };
    if let Some(key) = read(path)? {
        return Ok((key, false));
    }
    let key = random().map_err(failed("make"))?;
    match write(path, &key) {
        Ok(()) => Ok((key, true)),
        // Somebody else was faster: that key counts.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => match read(path)? {
            Some(key) => Ok((key, false)),
            None => Err(failed("read")(io::ErrorKind::NotFound.into())),
        },
        Err(error) => Err(failed("make")(error)),
    }
}

/// `None` when there is no such file.
fn read(path: &Path) -> Result<Option<SecretKey>, KeyFileError> {
    let attempt = || -> io::Result<String> {
        let file = fs::File::open(path)?;
        if file.metadata()?.permissions().mode() & 0o077 != 0 {
            tracing::warn!(
                "the WireGuard key file {} can be read by others: chmod 600 it",
                path.display()
            );
        }
        let mut text = String::new();
        file.take(LIMIT).read_to_string(&mut text)?;
        Ok(text)
    };
    let text = match attempt() {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) if error.kind() == io::ErrorKind::InvalidData => String::new(),
        Err(source) => {
            return Err(KeyFileError::Io {
                action: "read",
                path: path.to_owned(),
                source,
            });
        }
    };
    let key = text
        .trim()
        .parse()
        .map_err(|_not_a_key| KeyFileError::NoKey {
            path: path.to_owned(),
        })?;
    Ok(Some(key))
}

/// Nobody ever sees half of it, or an open one.
fn write(path: &Path, key: &SecretKey) -> io::Result<()> {
    if let Some(dir) = path.parent() {
        fs::create_dir_all(dir)?;
    }
    let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?;
    let beside = path.with_file_name(format!(
        ".{}.{}",
        name.to_string_lossy(),
        std::process::id()
    ));
    let attempt = || -> io::Result<()> {
        let mut file = fs::File::options()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&beside)?;
        file.write_all(key.to_base64().as_bytes())?;
        file.sync_all()?;
        // Unlike a rename it fails where there is one already.
        fs::hard_link(&beside, path)
    };
    let outcome = attempt();
    let _gone = fs::remove_file(&beside);
    outcome
}

fn random() -> io::Result<SecretKey> {
    let mut bytes = [0; flannel_core::key::LEN];
    fs::File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(private_from_random(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_made_once() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("run/wgkey");
        let (key, new) = obtain(&path).expect("made");
        assert!(new);
        assert_eq!(obtain(&path).expect("read"), (key, false));
        let mode = fs::metadata(&path).expect("the file").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let others = fs::read_dir(dir.path().join("run")).expect("list").count();
        assert_eq!(others, 1);
    }

    #[test]
    fn upstreams_file_and_one_with_a_line_end_are_read() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("wgkey");
        for end in ["", "\n", "\r\n"] {
            fs::write(
                &path,
                format!("yAnz5TF+lXXJte14tji3zlMNq+hd2rYUIgJBgB3fBmk={end}"),
            )
            .expect("write");
            let (key, new) = obtain(&path).expect("read");
            assert!(!new);
            assert_eq!(
                key.to_base64(),
                "yAnz5TF+lXXJte14tji3zlMNq+hd2rYUIgJBgB3fBmk="
            );
        }
    }

    #[test]
    fn a_file_without_a_key_is_left_alone() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("wgkey");
        for text in ["", "secret", "yAnz5TF+lXXJte14tji3zlMNq+hd2rYUIgJBgB3fBmk"] {
            fs::write(&path, text).expect("write");
            let error = obtain(&path).expect_err("no key").to_string();
            assert!(error.contains("has no private key"), "{error}");
            assert!(text.is_empty() || !error.contains(text), "{error}");
            assert_eq!(fs::read_to_string(&path).expect("read"), text);
        }
    }
}
