//! What host-local has given to whom: one file an address below `<dataDir>/<network>`, with the container on its first line and the
//! interface on its second (upstream: plugins' `ipam/host-local/backend/disk`).

use std::{
    collections::BTreeSet,
    fs, io,
    net::IpAddr,
    path::{Path, PathBuf},
};

use crate::{
    call,
    delegate::Delegate,
    error::{CniError, IO_FAILURE},
    netconf::Attachment,
};

const DATA_DIR: &str = "/var/lib/cni/networks";
/// Longer files are nobody's.
const MAX_LEN: u64 = 4096;

/// The attachments for which a delegate's network has addresses reserved. Empty if it is not host-local that gives them.
pub(crate) fn attachments(delegate: &Delegate) -> Result<BTreeSet<Attachment>, CniError> {
    let Some(dir) = dir(delegate) else {
        return Ok(BTreeSet::new());
    };
    let entries = match fs::read_dir(&dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(BTreeSet::new()),
        Err(error) => {
            return Err(CniError::new(
                IO_FAILURE,
                format!("list {}: {error}", dir.display()),
            ));
        }
    };
    let all = entries.flatten().filter_map(|entry| {
        entry
            .file_name()
            .to_str()
            .is_some_and(is_address)
            .then(|| read(&entry.path()))?
    });
    Ok(all.collect())
}

fn dir(delegate: &Delegate) -> Option<PathBuf> {
    let ipam = delegate.ipam()?;
    if ipam.get("type")?.as_str()? != "host-local" {
        return None;
    }
    let given = ipam.get("dataDir").and_then(|dir| dir.as_str());
    let dir = given.filter(|dir| !dir.is_empty()).unwrap_or(DATA_DIR);
    Some(Path::new(dir).join(delegate.network()?))
}

/// Beside the addresses there are a lock and the address given last.
fn is_address(name: &str) -> bool {
    name.parse::<IpAddr>().is_ok()
}

fn read(path: &Path) -> Option<Attachment> {
    let meta = fs::metadata(path).ok()?;
    if !meta.is_file() || meta.len() > MAX_LEN {
        return None;
    }
    parse(&fs::read_to_string(path).ok()?)
}

/// Files of very old versions have no interface; they are left to their runtime.
fn parse(text: &str) -> Option<Attachment> {
    let mut lines = text.lines();
    let (container, ifname) = (lines.next()?.trim(), lines.next()?.trim());
    (call::is_name(container) && !ifname.is_empty()).then(|| Attachment {
        container: container.to_owned(),
        ifname: ifname.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reservations_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let net = dir.path().join("cbr0");
        let delegate = |kind: &str| {
            Delegate::read(&format!(
                r#"{{"type":"bridge","name":"cbr0","ipam":{{"type":"{kind}","dataDir":"{}"}}}}"#,
                dir.path().display()
            ))
            .unwrap()
        };
        assert_eq!(attachments(&delegate("host-local")), Ok(BTreeSet::new()));
        fs::create_dir(&net).unwrap();
        for (name, text) in [
            ("10.1.17.2", "c1\r\neth0"),
            ("10.1.17.3", "c1\r\nnet1"),
            ("fc00::2", "c1\r\neth0"),
            ("10.1.17.4", "old"),
            ("10.1.17.5", "../x\neth0"),
            ("last_reserved_ip.0", "10.1.17.5"),
            ("lock", ""),
        ] {
            fs::write(net.join(name), text).unwrap();
        }
        let found = attachments(&delegate("host-local")).unwrap();
        let found: Vec<_> = found
            .iter()
            .map(|found| (found.container.as_str(), found.ifname.as_str()))
            .collect();
        assert_eq!(found, [("c1", "eth0"), ("c1", "net1")]);
        assert_eq!(attachments(&delegate("dhcp")), Ok(BTreeSet::new()));
    }
}
