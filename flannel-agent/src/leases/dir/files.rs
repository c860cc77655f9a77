//! What is done to the directory of lease files, in blocking steps.
//!
//! A lease file appears complete or not at all: its content is written to a scratch file first, which is then linked
//! (creating: fails when the name exists) or renamed (replacing).

use std::{
    fs::{self, File, OpenOptions},
    hash::{DefaultHasher, Hash as _, Hasher as _},
    io::{self, ErrorKind, Read as _, Write as _},
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    path::Path,
    time::SystemTime,
};

use super::Raw;

/// Longer than any lease; a longer file is something else.
const LONGEST_VALUE: u64 = 64 << 10;

/// Tells one directory from another of the same name: device, inode, and the time of creation where the file system
/// knows it, since the number of a removed inode is soon given to another one.
pub(super) type DirId = (u64, u64, Option<SystemTime>);

pub(super) fn identity(dir: &Path) -> io::Result<DirId> {
    let metadata = fs::metadata(dir)?;
    Ok((metadata.dev(), metadata.ino(), metadata.created().ok()))
}

/// Makes the directory, not its parents: a parent that does not exist is a file system that is not mounted.
pub(super) fn ensure_dir(dir: &Path) -> io::Result<()> {
    match fs::create_dir(dir) {
        Err(error) if error.kind() == ErrorKind::AlreadyExists && dir.is_dir() => Ok(()),
        made => made,
    }
}

/// All files that may be leases. A file that vanishes meanwhile is left out, one that cannot be read is reported.
pub(super) fn scan(dir: &Path) -> io::Result<Vec<Raw>> {
    let mut list = Vec::new();
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with('.') {
            continue;
        }
        let value = match read(&entry.path()) {
            Err(error) if error.kind() == ErrorKind::NotFound => continue,
            read => read.map_err(|error| error.to_string()),
        };
        list.push(Raw {
            name,
            mod_revision: digest(&value),
            value,
            lease_id: 0,
        });
    }
    list.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(list)
}

fn read(path: &Path) -> io::Result<Vec<u8>> {
    // A pipe must not block the scan, neither by opening nor by reading it.
    if !fs::metadata(path)?.is_file() {
        return Err(io::Error::other("not a regular file"));
    }
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)?;
    let mut value = Vec::new();
    file.take(LONGEST_VALUE + 1).read_to_end(&mut value)?;
    if u64::try_from(value.len()).unwrap_or(u64::MAX) > LONGEST_VALUE {
        return Err(io::Error::other("too long for a lease"));
    }
    Ok(value)
}

/// Stands in for the revision that files do not have.
pub(super) fn digest(value: &Result<Vec<u8>, String>) -> i64 {
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    hasher.finish().cast_signed()
}

/// Creates `name`. `false` when it exists.
pub(super) fn create(dir: &Path, scratch: &str, name: &str, value: &str) -> io::Result<bool> {
    let scratch = dir.join(scratch);
    write(&scratch, value)?;
    let linked = fs::hard_link(&scratch, dir.join(name));
    // Over NFS the answer to a successful link may get lost, and its repetition fails.
    let twice = fs::metadata(&scratch).is_ok_and(|metadata| metadata.nlink() == 2);
    fs::remove_file(&scratch)?;
    match linked {
        Err(error) if error.kind() == ErrorKind::AlreadyExists && !twice => return Ok(false),
        Err(error) if !twice => return Err(error),
        _ => {}
    }
    sync_dir(dir)?;
    Ok(true)
}

/// Puts a new content in place of that of `name`.
pub(super) fn replace(dir: &Path, scratch: &str, name: &str, value: &str) -> io::Result<()> {
    let scratch = dir.join(scratch);
    write(&scratch, value)?;
    fs::rename(&scratch, dir.join(name))?;
    sync_dir(dir)
}

/// Removes `name`, if it exists.
pub(super) fn remove(dir: &Path, name: &str) -> io::Result<()> {
    match fs::remove_file(dir.join(name)) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
        _ => sync_dir(dir),
    }
}

fn write(path: &Path, value: &str) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o644)
        .open(path)?;
    file.write_all(value.as_bytes())?;
    file.sync_all()
}

fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn creating_is_exclusive_and_leaves_no_scratch_file() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        assert!(create(dir, ".a", "10.5.1.0-24", "one").unwrap());
        assert!(!create(dir, ".b", "10.5.1.0-24", "two").unwrap());
        replace(dir, ".a", "10.5.1.0-24", "three").unwrap();
        let list = scan(dir).unwrap();
        assert_eq!(list.len(), 1);
        assert_eq!(list[0].value.as_deref(), Ok(&b"three"[..]));
        assert_eq!(fs::read_dir(dir).unwrap().count(), 1);
        remove(dir, "10.5.1.0-24").unwrap();
        remove(dir, "10.5.1.0-24").unwrap();
        assert!(scan(dir).unwrap().is_empty());
    }

    #[test]
    fn a_scratch_file_of_a_crash_is_in_nobodys_way() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        fs::write(dir.join(".a"), "half").unwrap();
        assert!(scan(dir).unwrap().is_empty());
        assert!(create(dir, ".a", "10.5.1.0-24", "one").unwrap());
        assert_eq!(fs::read(dir.join("10.5.1.0-24")).unwrap(), b"one");
    }

    #[test]
    fn what_is_no_file_is_named_and_hides_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        fs::create_dir(dir.join("10.5.1.0-24")).unwrap();
        fs::write(dir.join("10.5.2.0-24"), vec![b' '; 70_000]).unwrap();
        nix::unistd::mkfifo(&dir.join("10.5.3.0-24"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        fs::write(dir.join("10.5.4.0-24"), "ok").unwrap();
        let values: Vec<_> = scan(dir)
            .unwrap()
            .into_iter()
            .map(|raw| raw.value)
            .collect();
        assert!(values[..3].iter().all(Result::is_err), "{values:?}");
        assert_eq!(values[3].as_deref(), Ok(&b"ok"[..]));
    }

    #[test]
    fn parents_are_not_made() {
        let dir = tempfile::tempdir().unwrap();
        let subnets = dir.path().join("subnets");
        ensure_dir(&subnets).unwrap();
        ensure_dir(&subnets).unwrap();
        assert!(ensure_dir(&dir.path().join("missing/subnets")).is_err());
    }
}
