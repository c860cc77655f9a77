//! The `newc` form of cpio, which the kernel unpacks as initramfs (`Documentation/driver-api/early-userspace/buffer-format.rst`).

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

const DIRECTORY: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;
const TRAILER: &str = "TRAILER!!!";

/// Files by their absolute paths. All are executable and root's.
#[derive(Clone, Debug, Default)]
pub(super) struct Archive {
    files: BTreeMap<String, Vec<u8>>,
}

impl Archive {
    pub(super) fn add(&mut self, path: impl Into<String>, content: Vec<u8>) {
        self.files.insert(path.into(), content);
    }

    /// Adds a file of this machine under the path it has here.
    pub(super) fn add_same(&mut self, path: &Path) -> Result<()> {
        let content = fs::read(path).with_context(|| format!("read {}", path.display()))?;
        self.add(path.display().to_string(), content);
        Ok(())
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
        for (path, content) in &self.files {
            entry(out, path, PROGRAM, content)?;
        }
        entry(out, TRAILER, 0, &[])
    }

    /// Every directory above a file, parents first.
    fn directories(&self) -> Vec<String> {
        let mut found: Vec<String> = self
            .files
            .keys()
            .flat_map(|path| {
                let path = PathBuf::from(path);
                let above = path.ancestors().skip(1);
                above
                    .map(|dir| dir.display().to_string())
                    .collect::<Vec<_>>()
            })
            .filter(|path| path != "/")
            .collect();
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
}
