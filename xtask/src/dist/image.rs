//! The image, as an OCI layout: a directory of blobs named by their checksums, and JSON that names them.
//!
//! deploy/Containerfile makes the same image; a test compares the two.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use super::arch::Arch;
use super::binaries::Binaries;
use super::bundle;
use super::stamp::Stamp;

/// Where the image's files are put, besides the base. The agent is called by three names.
pub(super) const AGENT: &str = "opt/bin/flanneld";
pub(super) const LINKS: [(&str, &str); 2] = [
    ("opt/bin/flannel-agent", "flanneld"),
    ("opt/bin/install-conf", "flanneld"),
];
pub(super) const SCRIPT: &str = "opt/bin/mk-docker-opts.sh";
pub(super) const PLUGIN: &str = "flannel";
pub(super) const LICENCES: &str = "usr/share/doc/flannel-ebpf";
pub(super) const ENTRYPOINT: &str = "/opt/bin/flanneld";
pub(super) const PATH: &str = "/opt/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Labels that are the same in every image.
pub(super) const LABELS: [(&str, &str); 8] = [
    (
        "org.opencontainers.image.description",
        "Carries pod traffic between nodes in VXLAN, with eBPF; in flannel's place",
    ),
    (
        "org.opencontainers.image.documentation",
        "https://github.com/flannel-ebpf/flannel-ebpf/tree/main/docs",
    ),
    (
        "org.opencontainers.image.licenses",
        "Apache-2.0 AND (MIT OR GPL-2.0-only)",
    ),
    (
        "org.opencontainers.image.source",
        "https://github.com/flannel-ebpf/flannel-ebpf",
    ),
    ("org.opencontainers.image.title", "flannel-ebpf"),
    (
        "org.opencontainers.image.url",
        "https://github.com/flannel-ebpf/flannel-ebpf",
    ),
    ("org.opencontainers.image.vendor", "flannel-ebpf"),
    // There is no base image: the packages are Debian's, each named in the bill of materials.
    ("org.opencontainers.image.base.name", "scratch"),
];

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const INDEX: &str = "application/vnd.oci.image.index.v1+json";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
const REF_NAME: &str = "org.opencontainers.image.ref.name";

/// Lays out the image's own files below `dir`.
pub(super) fn stage(root: &Path, dir: &Path, binaries: &Binaries) -> Result<()> {
    bundle::empty(dir)?;
    bundle::copy(&binaries.agent, &dir.join(AGENT))?;
    bundle::copy(&binaries.plugin, &dir.join(PLUGIN))?;
    bundle::copy(
        &root.join("deploy/bin/mk-docker-opts.sh"),
        &dir.join(SCRIPT),
    )?;
    for name in bundle::names(root)? {
        if name.starts_with("LICENSE-") {
            bundle::copy(&root.join(&name), &dir.join(LICENCES).join(&name))?;
        }
    }
    for (link, to) in LINKS {
        let link = dir.join(link);
        symlink(to, &link).with_context(|| format!("link {}", link.display()))?;
    }
    Ok(())
}

/// The image of one architecture: directories, each a layer, the base first.
pub(super) struct Platform {
    pub(super) arch: Arch,
    pub(super) layers: Vec<(PathBuf, &'static str)>,
}

/// Writes a layout with one image for all architectures under the tag, and each architecture's alone under `<tag>-<arch>`, for tools
/// that know no lists.
pub(super) fn write_layout(layout: &Path, stamp: &Stamp, platforms: &[Platform]) -> Result<()> {
    bundle::empty(layout)?;
    let blobs = Blobs {
        dir: layout.join("blobs/sha256"),
    };
    fs::create_dir_all(&blobs.dir).with_context(|| format!("create {}", blobs.dir.display()))?;
    let tag = format!("v{}", stamp.version);
    let (mut of_index, mut tagged) = (Vec::new(), Vec::new());
    for platform in platforms {
        let arch = platform.arch.name();
        let mut descriptor = write_manifest(&blobs, stamp, platform)?;
        descriptor["platform"] = json!({"architecture": arch, "os": "linux"});
        of_index.push(descriptor.clone());
        descriptor["annotations"] = json!({REF_NAME: format!("{tag}-{arch}")});
        tagged.push(descriptor);
    }
    let index = json!({
        "schemaVersion": 2,
        "mediaType": INDEX,
        "manifests": of_index,
        "annotations": annotations(stamp),
    });
    let mut descriptor = blobs.add_json(&index, INDEX)?;
    descriptor["annotations"] = json!({REF_NAME: tag});
    tagged.insert(0, descriptor);
    let entry = json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": tagged});
    for (name, value) in [
        ("index.json", entry),
        ("oci-layout", json!({"imageLayoutVersion": "1.0.0"})),
    ] {
        let path = layout.join(name);
        fs::write(&path, value.to_string()).with_context(|| format!("write {}", path.display()))?;
    }
    Ok(())
}

fn write_manifest(blobs: &Blobs, stamp: &Stamp, platform: &Platform) -> Result<Value> {
    let (mut layers, mut ids, mut history) = (Vec::new(), Vec::new(), Vec::new());
    for (dir, made_by) in &platform.layers {
        let (descriptor, id) = blobs.add_layer(dir, stamp.epoch)?;
        layers.push(descriptor);
        ids.push(format!("sha256:{id}"));
        history.push(json!({"created": stamp.time(), "created_by": made_by}));
    }
    let config = json!({
        "architecture": platform.arch.name(),
        "os": "linux",
        "created": stamp.time(),
        "config": {
            "Entrypoint": [ENTRYPOINT],
            "Env": [format!("PATH={PATH}")],
            "Labels": annotations(stamp),
            "WorkingDir": "/",
        },
        "rootfs": {"type": "layers", "diff_ids": ids},
        "history": history,
    });
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": blobs.add_json(&config, CONFIG)?,
        "layers": layers,
        "annotations": annotations(stamp),
    });
    blobs.add_json(&manifest, MANIFEST)
}

/// What the image says of itself.
fn annotations(stamp: &Stamp) -> Value {
    let mut all = json!({
        "org.opencontainers.image.created": stamp.time(),
        "org.opencontainers.image.revision": stamp.revision,
        "org.opencontainers.image.version": stamp.version,
    });
    for (name, value) in LABELS {
        all[name] = json!(value);
    }
    all
}

/// The directory of blobs.
struct Blobs {
    dir: PathBuf,
}

impl Blobs {
    fn add_json(&self, value: &Value, kind: &str) -> Result<Value> {
        let scratch = self.dir.join("scratch");
        fs::write(&scratch, value.to_string())
            .with_context(|| format!("write {}", scratch.display()))?;
        self.take(&scratch, kind)
    }

    /// Returns the descriptor, and the checksum of what is compressed in it.
    fn add_layer(&self, dir: &Path, epoch: u64) -> Result<(Value, String)> {
        let (plain, packed) = (self.dir.join("layer.tar"), self.dir.join("layer.gz"));
        bundle::tar(dir, &bundle::names(dir)?, epoch, &plain)?;
        let id = bundle::sha256(&plain)?;
        bundle::gzip(&plain, &packed)?;
        fs::remove_file(&plain).with_context(|| format!("remove {}", plain.display()))?;
        Ok((self.take(&packed, LAYER)?, id))
    }

    /// Gives a file its name.
    fn take(&self, path: &Path, kind: &str) -> Result<Value> {
        let digest = bundle::sha256(path)?;
        let size = fs::metadata(path)
            .with_context(|| format!("look at {}", path.display()))?
            .len();
        let to = self.dir.join(&digest);
        fs::rename(path, &to)
            .with_context(|| format!("rename {} to {}", path.display(), to.display()))?;
        Ok(json!({"mediaType": kind, "digest": format!("sha256:{digest}"), "size": size}))
    }
}

#[cfg(test)]
mod tests;
