//! `cargo xtask dist`: what a release consists of.

pub(crate) mod arch;
mod binaries;
mod bundle;
mod image;
mod rootfs;
mod sbom;
mod smoke;
mod stamp;
pub(crate) mod tools;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context as _, Result, bail};
use serde_json::Value;
use xtask::ebpf;

use arch::{Arch, Arches};
use binaries::Binaries;
use image::Platform;
use stamp::Stamp;

/// What to make of a release.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// For what to build: amd64, arm64 or all
    #[arg(long, default_value = "all", value_name = "ARCH")]
    arch: Arches,
    /// Where to put it, relative to the workspace
    #[arg(long, default_value = "target/packages", value_name = "DIR")]
    out: PathBuf,
    /// Make the container image, too: an OCI layout of Debian's packages, without a container engine
    #[arg(long)]
    image: bool,
    /// Only lay out the image's files, in <DIR>/<ARCH>/{rootfs,own}: what deploy/Containerfile copies
    #[arg(long, conflicts_with = "image")]
    stage: bool,
}

pub(crate) fn run(root: &Path, args: &Args) -> Result<()> {
    let start = Instant::now();
    let Arches(arches) = &args.arch;
    let out = root.join(&args.out);
    // The compiler runs in another directory.
    let out = std::path::absolute(&out).with_context(|| format!("find {}", out.display()))?;
    tools::ensure(root, arches, args.image || args.stage)?;
    let stamp = Stamp::of(root, env!("CARGO_PKG_VERSION"))?;
    if stamp.revision.ends_with("-dirty") {
        eprintln!("dist: the tree has changes that are not committed: this is no release");
    }
    eprintln!("dist: building the eBPF object, one for all architectures");
    let built = ebpf::build(root, &[])?;
    // A copy: another build in this tree must not change it between two architectures.
    let object = out.join("ebpf").join(ebpf::OBJECT_NAME);
    bundle::copy(&built, &object)?;
    eprintln!("dist: eBPF object {}", binaries::sha256(&object)?);
    let release = Release {
        root,
        out: &out,
        stamp: &stamp,
    };
    let mut files = Vec::new();
    let mut platforms = Vec::new();
    for arch in arches {
        let binaries = release.build(*arch, &object)?;
        if args.stage {
            release.base(*arch)?;
            image::stage(root, &release.home(*arch).join("own"), &binaries)?;
            continue;
        }
        let bill = sbom::of_binaries(root, *arch, &stamp)?;
        files.extend(release.bundle(*arch, &binaries, &bill)?);
        if args.image {
            let (platform, bill) = release.platform(*arch, &binaries, &bill)?;
            platforms.push(platform);
            files.push(bill);
        }
    }
    if args.stage {
        return Ok(());
    }
    if args.image {
        files.push(release.image(&platforms)?);
    }
    bundle::write_sums(&out, &files)?;
    files.push(out.join("SHA256SUMS"));
    report(&files)?;
    let seconds = start.elapsed().as_secs();
    eprintln!("dist: done in {} min {} s", seconds / 60, seconds % 60);
    Ok(())
}

/// What all steps know.
struct Release<'a> {
    root: &'a Path,
    out: &'a Path,
    stamp: &'a Stamp,
}

impl Release<'_> {
    /// Intermediate results of one architecture.
    fn home(&self, arch: Arch) -> PathBuf {
        self.out.join(arch.name())
    }

    fn build(&self, arch: Arch, object: &Path) -> Result<Binaries> {
        eprintln!(
            "dist: {arch}: building flannel-agent and flannel (5 to 10 minutes the first time)"
        );
        let start = Instant::now();
        let dir = self.home(arch).join("bin");
        let binaries = binaries::build(self.root, arch, self.stamp, object, &dir)?;
        for path in [&binaries.agent, &binaries.plugin] {
            binaries::inspect(path, arch)?;
        }
        binaries::require_object(&binaries.agent, object)?;
        binaries::try_out(&binaries, arch, self.stamp)?;
        eprintln!(
            "dist: {arch}: static, stripped, and they start; the agent has that object, byte for byte ({} s)",
            start.elapsed().as_secs()
        );
        for path in [&binaries.agent, &binaries.plugin] {
            let bytes =
                fs::metadata(path).with_context(|| format!("look at {}", path.display()))?;
            let kilobytes = bytes.len().div_ceil(1000);
            eprintln!("dist: {arch}: {kilobytes} kB {}", path.display());
        }
        Ok(binaries)
    }

    /// The tarball and the bill.
    fn bundle(&self, arch: Arch, binaries: &Binaries, bill: &Value) -> Result<[PathBuf; 2]> {
        let stem = self.stamp.stem(arch);
        eprintln!("dist: {arch}: packing {stem}.tar.gz");
        let of_bill = self.out.join(format!("{stem}.cdx.json"));
        write_json(&of_bill, bill)?;
        let staging = self.home(arch).join("tarball");
        bundle::stage(self.root, &staging.join(&stem), binaries, &of_bill)?;
        let (plain, packed) = (
            self.home(arch).join("tar"),
            self.out.join(format!("{stem}.tar.gz")),
        );
        bundle::tar(
            &staging,
            std::slice::from_ref(&stem),
            self.stamp.epoch,
            &plain,
        )?;
        bundle::gzip(&plain, &packed)?;
        fs::remove_file(&plain).with_context(|| format!("remove {}", plain.display()))?;
        fs::remove_dir_all(&staging).with_context(|| format!("remove {}", staging.display()))?;
        Ok([packed, of_bill])
    }

    /// The image's base of one architecture.
    fn base(&self, arch: Arch) -> Result<(PathBuf, Vec<sbom::Package>)> {
        eprintln!("dist: {arch}: fetching Debian's packages (about 10 MB) for the image's base");
        let dir = self.home(arch).join("rootfs");
        let work = self.root.join("target").join("archive");
        let packages = rootfs::make(arch, &work, &dir)?;
        Ok((dir, packages))
    }

    /// The layers of one architecture's image, and its bill.
    fn platform(
        &self,
        arch: Arch,
        binaries: &Binaries,
        bill: &Value,
    ) -> Result<(Platform, PathBuf)> {
        let (base, packages) = self.base(arch)?;
        let own = self.home(arch).join("own");
        image::stage(self.root, &own, binaries)?;
        let programs = smoke::run(&base, &own, arch, self.stamp)?;
        eprintln!("dist: {arch}: these start in the image: {programs}");
        let path = self.out.join(format!(
            "flannel-ebpf-{}-image-{arch}.cdx.json",
            self.stamp.version
        ));
        write_json(&path, &sbom::of_image(bill, &packages)?)?;
        let platform = Platform {
            arch,
            layers: vec![
                (
                    base,
                    "Debian 12: iproute2, iptables, nftables, kmod, ca-certificates, dash, busybox",
                ),
                (own, "cargo xtask dist --image"),
            ],
        };
        Ok((platform, path))
    }

    /// The layout, and an archive of it.
    fn image(&self, platforms: &[Platform]) -> Result<PathBuf> {
        let layout = self.out.join("image");
        eprintln!("dist: packing the image into {}", layout.display());
        image::write_layout(&layout, self.stamp, platforms)?;
        let archive = self
            .out
            .join(format!("flannel-ebpf-{}-image.tar", self.stamp.version));
        bundle::tar(
            &layout,
            &bundle::names(&layout)?,
            self.stamp.epoch,
            &archive,
        )?;
        Ok(archive)
    }
}

fn write_json(path: &Path, value: &Value) -> Result<()> {
    let text = serde_json::to_string_pretty(value).context("write JSON")?;
    fs::write(path, text + "\n").with_context(|| format!("write {}", path.display()))
}

fn report(files: &[PathBuf]) -> Result<()> {
    let mut files = files.to_vec();
    files.sort();
    for path in files {
        let meta = fs::metadata(&path).with_context(|| format!("look at {}", path.display()))?;
        if meta.len() == 0 {
            bail!("{} is empty", path.display());
        }
        let kilobytes = meta.len().div_ceil(1000);
        println!("{kilobytes:>8} kB  {}", path.display());
    }
    Ok(())
}
