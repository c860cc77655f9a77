//! Files that others read: written beside, synced, renamed, so that nobody sees half of one.

use std::{
    fs,
    io::{self, Write as _},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use thiserror::Error;

/// A file or directory that cannot be used.
#[derive(Debug, Error)]
#[error("{action} {}: {source}: {fix}", path.display())]
pub struct FileError {
    action: &'static str,
    path: PathBuf,
    fix: &'static str,
    source: io::Error,
}

/// Replaces a file, making its directory if need be (0755, the file 0644).
pub(crate) fn replace(path: &Path, text: &str) -> Result<(), FileError> {
    attempt(path, text).map_err(|source| error(path, source))
}

/// Removes a file of ours that says nothing true any more, if there is one.
pub(crate) fn forget(path: &Path) {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::debug!(path = %path.display(), %error, "remove a file");
        }
        _ => {}
    }
}

/// Finds out whether [`replace`] would work, leaving neither file nor directory behind.
pub(crate) fn check_writable(path: &Path) -> Result<(), FileError> {
    let probe = || -> io::Result<()> {
        if path.is_dir() {
            return Err(io::Error::from(io::ErrorKind::IsADirectory));
        }
        let made: Vec<&Path> = path
            .ancestors()
            .skip(1)
            .take_while(|dir| !dir.as_os_str().is_empty() && !dir.exists())
            .collect();
        let outcome = beside(path).and_then(|(temporary, file)| {
            drop(file);
            fs::remove_file(temporary)
        });
        for dir in made {
            // Not empty any more: somebody else has use for it.
            let _kept = fs::remove_dir(dir);
        }
        outcome
    };
    probe().map_err(|source| error(path, source))
}

/// Finds out whether leases can be kept in a directory, changing nothing. Troubles that may pass, as those of a network file
/// system, are left to the store.
pub(crate) fn check_lease_dir(dir: &Path) -> Result<(), FileError> {
    use nix::{
        errno::Errno,
        unistd::{AccessFlags, access},
    };
    let usable = AccessFlags::R_OK | AccessFlags::W_OK | AccessFlags::X_OK;
    let refuse = |path: &Path, errno: Errno, fix| {
        Err(FileError {
            action: "keep leases in",
            path: path.to_owned(),
            fix,
            source: errno.into(),
        })
    };
    for path in [dir.to_owned(), dir.join("subnets")] {
        match access(&path, usable) {
            _ if path.exists() && !path.is_dir() => {
                return refuse(&path, Errno::ENOTDIR, "name a directory with --lease-dir");
            }
            Err(errno @ Errno::ENOENT) if path == dir => {
                return refuse(
                    &path,
                    errno,
                    "create it, mount the file system that has it, or name another with --lease-dir",
                );
            }
            Err(errno @ Errno::ENOTDIR) => {
                return refuse(&path, errno, "name a directory with --lease-dir");
            }
            Err(errno @ (Errno::EACCES | Errno::EPERM | Errno::EROFS)) => {
                return refuse(
                    &path,
                    errno,
                    "make it readable and writable for this user, or name another with --lease-dir",
                );
            }
            _ => {}
        }
    }
    Ok(())
}

fn error(path: &Path, source: io::Error) -> FileError {
    FileError {
        action: "write",
        path: path.to_owned(),
        fix: "name a file in a writable directory",
        source,
    }
}

fn attempt(path: &Path, text: &str) -> io::Result<()> {
    let (temporary, mut file) = beside(path)?;
    let written = file
        .write_all(text.as_bytes())
        .and_then(|()| file.set_permissions(fs::Permissions::from_mode(0o644)))
        .and_then(|()| file.sync_all())
        .and_then(|()| fs::rename(&temporary, path));
    if written.is_err() {
        // The first error is the one worth telling.
        let _gone = fs::remove_file(&temporary);
    }
    written
}

fn beside(path: &Path) -> io::Result<(PathBuf, fs::File)> {
    let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?;
    let dir = match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir,
        _ => Path::new("."),
    };
    fs::create_dir_all(dir)?;
    let temporary = dir.join(format!(
        ".{}.{}",
        name.to_string_lossy(),
        std::process::id()
    ));
    let file = fs::File::create(&temporary)?;
    Ok((temporary, file))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replaces_and_leaves_nothing_else() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("a/b/subnet.env");
        check_writable(&path).expect("writable");
        assert!(!dir.path().join("a").exists());
        replace(&path, "one\n").expect("write");
        replace(&path, "two\n").expect("write again");
        assert_eq!(fs::read_to_string(&path).expect("read"), "two\n");
        assert_eq!(
            fs::metadata(&path).expect("stat").permissions().mode() & 0o777,
            0o644
        );
        assert_eq!(
            fs::read_dir(path.parent().expect("parent"))
                .expect("list")
                .count(),
            1
        );
    }

    #[test]
    fn a_lease_directory_is_one() {
        let dir = tempfile::tempdir().expect("tempdir");
        let dir = dir.path();
        check_lease_dir(dir).expect("without subnets");
        assert!(check_lease_dir(&dir.join("missing")).is_err());
        fs::write(dir.join("subnets"), "").expect("write");
        let error = check_lease_dir(dir).expect_err("subnets is a file");
        assert!(error.to_string().contains("subnets: "), "{error}");
        assert!(check_lease_dir(&dir.join("subnets")).is_err());
    }

    #[test]
    fn says_what_cannot_be_written() {
        let dir = tempfile::tempdir().expect("tempdir");
        let file = dir.path().join("file");
        fs::write(&file, "").expect("write");
        let error = check_writable(&file.join("subnet.env")).expect_err("a file is no directory");
        assert!(error.to_string().contains("file/subnet.env"), "{error}");
        assert!(
            check_writable(dir.path()).is_err(),
            "a directory is no file"
        );
    }
}
