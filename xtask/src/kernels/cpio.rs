//! The `newc` form of cpio, which the kernel unpacks as initramfs (`Documentation/driver-api/early-userspace/buffer-format.rst`).

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context as _, Result};

const DIRECTORY: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;
const LINK: u32 = 0o120_777;
const TRAILER: &str = "TRAILER!!!";

/// What is at a path.
#[derive(Clone, Debug)]
enum Entry {
    Directory,
    File(Arc<[u8]>),
    Link(String),
}

/// Files by their absolute paths. All are executable and root's. A clone shares what is in them.
#[derive(Clone, Debug, Default)]
pub(super) struct Archive {
    entries: BTreeMap<String, Entry>,
}

impl Archive {
    pub(super) fn add(&mut self, path: impl Into<String>, content: impl Into<Arc<[u8]>>) {
        self.entries
            .insert(path.into(), Entry::File(content.into()));
    }

    pub(super) fn link(&mut self, path: impl Into<String>, to: impl Into<String>) {
        self.entries.insert(path.into(), Entry::Link(to.into()));
    }

    /// Adds all that is below a directory of this machine, as if that were the root.
    pub(super) fn add_below(&mut self, root: &Path) -> Result<()> {
        self.walk(root, "")
    }

    fn walk(&mut self, dir: &Path, above: &str) -> Result<()> {
        let listed = || format!("list {}", dir.display());
        for entry in fs::read_dir(dir).with_context(listed)? {
            let entry = entry.with_context(listed)?;
            let path = entry.path();
            let name = format!("{above}/{}", entry.file_name().display());
            let kind = entry.file_type().with_context(listed)?;
            let reading = || format!("read {}", path.display());
            if kind.is_symlink() {
                let to = fs::read_link(&path).with_context(reading)?;
                self.link(name, to.display().to_string());
            } else if kind.is_dir() {
                self.entries.insert(name.clone(), Entry::Directory);
                self.walk(&path, &name)?;
            } else {
                self.add(name, fs::read(&path).with_context(reading)?);
            }
        }
        Ok(())
    }

    /// Adds all of another archive below a directory.
    pub(super) fn merge_below(&mut self, dir: &str, other: Self) {
        let moved = other.entries.into_iter();
        self.entries
            .extend(moved.map(|(path, what)| (format!("{dir}{path}"), what)));
    }

    pub(super) fn write(&self, path: &Path) -> Result<()> {
        let file = File::create(path).with_context(|| format!("create {}", path.display()))?;
        let mut out = BufWriter::new(file);
        self.write_to(&mut out)
            .and_then(|()| out.flush())
            .with_context(|| format!("write {}", path.display()))
    }

    fn write_to(&self, out: &mut impl Write) -> io::Result<()> {
        for path in self.directories() {
            entry(out, &path, DIRECTORY, &[])?;
        }
        for (path, what) in &self.entries {
            match what {
                Entry::Directory => {}
                Entry::File(content) => entry(out, path, PROGRAM, content)?,
                Entry::Link(to) => entry(out, path, LINK, to.as_bytes())?,
            }
        }
        entry(out, TRAILER, 0, &[])
    }

    /// Every directory, and every one above a file; parents first. What is a link already is none.
    fn directories(&self) -> Vec<String> {
        let own = self
            .entries
            .iter()
            .filter(|(_, what)| matches!(what, Entry::Directory));
        let mut found: Vec<String> = own.map(|(path, _)| path.clone()).collect();
        for path in self.entries.keys() {
            let path = PathBuf::from(path);
            let above = path.ancestors().skip(1);
            found.extend(above.map(|dir| dir.display().to_string()));
        }
        found.retain(|path| path != "/" && !matches!(self.entries.get(path), Some(Entry::Link(_))));
        found.sort();
        found.dedup();
        found
    }
}

fn entry(out: &mut impl Write, path: &str, mode: u32, content: &[u8]) -> io::Result<()> {
    let name = path.trim_start_matches('/');
    let size = u32::try_from(content.len()).map_err(io::Error::other)?;
    let name_size = u32::try_from(name.len() + 1).map_err(io::Error::other)?;
    // Inode, mode, owner, group, links, time, size, four numbers of devices, length of the name, checksum.
    let fields = [0, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name_size, 0];
    let mut header = String::from("070701");
    for field in fields {
        write!(header, "{field:08x}").map_err(io::Error::other)?;
    }
    out.write_all(header.as_bytes())?;
    out.write_all(name.as_bytes())?;
    out.write_all(&[0])?;
    pad(out, header.len() + name.len() + 1)?;
    out.write_all(content)?;
    pad(out, content.len())
}

/// To the next multiple of four.
fn pad(out: &mut impl Write, len: usize) -> io::Result<()> {
    out.write_all(&[0; 3][..len.wrapping_neg() % 4])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_has_its_directories_first() {
        let mut archive = Archive::default();
        archive.add("/a/b/c", b"12345".to_vec());
        archive.add("/init", Vec::new());
        assert_eq!(archive.directories(), ["/a", "/a/b"]);
        let mut bytes = Vec::new();
        archive.write_to(&mut bytes).expect("write to memory");
        assert_eq!(bytes.len() % 4, 0);
        let text = String::from_utf8(bytes).expect("ASCII");
        assert_eq!(text.matches("070701").count(), 5);
        // Length 5, and a name of three parts with its NUL.
        assert!(text.contains("00000005"), "{text}");
        assert!(text.contains("a/b/c\0"), "{text}");
        assert!(text.ends_with('\0'));
    }

    #[test]
    fn what_is_below_a_directory_is_taken_with_its_links() {
        let dir = tempfile::tempdir().expect("a directory");
        fs::create_dir_all(dir.path().join("usr/bin")).expect("mkdir");
        fs::create_dir(dir.path().join("empty")).expect("mkdir");
        fs::write(dir.path().join("usr/bin/x"), "1").expect("write");
        std::os::unix::fs::symlink("usr/bin", dir.path().join("bin")).expect("link");
        let mut archive = Archive::default();
        archive.add_below(dir.path()).expect("it is readable");
        assert_eq!(archive.directories(), ["/empty", "/usr", "/usr/bin"]);
        assert!(matches!(archive.entries.get("/bin"), Some(Entry::Link(to)) if to == "usr/bin"));
        assert!(matches!(
            archive.entries.get("/usr/bin/x"),
            Some(Entry::File(_))
        ));
    }
}
