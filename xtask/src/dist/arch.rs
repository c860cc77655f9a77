//! What a release is built for.

use std::ffi::OsString;
use std::fmt;
use std::str::FromStr;

/// An architecture, by the name that Go, Kubernetes and Debian give it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Arch {
    Amd64,
    Arm64,
}

impl Arch {
    pub(crate) const ALL: [Self; 2] = [Self::Amd64, Self::Arm64];

    /// The architecture of this machine, if it is one of them.
    pub(crate) fn host() -> Option<Self> {
        match std::env::consts::ARCH {
            "x86_64" => Some(Self::Amd64),
            "aarch64" => Some(Self::Arm64),
            _ => None,
        }
    }

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Amd64 => "amd64",
            Self::Arm64 => "arm64",
        }
    }

    /// Rust's target. With musl the C library is part of the binary: one that is linked to Debian's glibc 2.36 starts on no older
    /// system, and not on Alpine.
    pub(crate) const fn target(self) -> &'static str {
        match self {
            Self::Amd64 => "x86_64-unknown-linux-musl",
            Self::Arm64 => "aarch64-unknown-linux-musl",
        }
    }

    /// What Debian's cross compilers and their directories are named by.
    pub(crate) const fn gnu(self) -> &'static str {
        match self {
            Self::Amd64 => "x86_64-linux-gnu",
            Self::Arm64 => "aarch64-linux-gnu",
        }
    }

    /// Debian's cross compiler and the headers that it needs.
    pub(super) const fn cross_packages(self) -> [&'static str; 2] {
        match self {
            Self::Amd64 => ["gcc-x86-64-linux-gnu", "libc6-dev-amd64-cross"],
            Self::Arm64 => ["gcc-aarch64-linux-gnu", "libc6-dev-arm64-cross"],
        }
    }

    /// What a build for it needs to be told beside `--target`: Debian's compiler for the C of ring, and rust-lld with what Rust has of
    /// musl for all the rest. No cross linker is needed. ring asks the C library for nothing that differs between musl and glibc,
    /// whose headers the compiler finds.
    pub(crate) fn toolchain(self) -> [(String, OsString); 2] {
        let lower = self.target().replace('-', "_");
        let upper = lower.to_uppercase();
        let compiler = if Self::host() == Some(self) {
            "cc".to_owned()
        } else {
            format!("{}-gcc", self.gnu())
        };
        [
            (format!("CC_{lower}"), compiler.into()),
            (format!("CARGO_TARGET_{upper}_LINKER"), "rust-lld".into()),
        ]
    }

    /// QEMU's name of it.
    pub(super) const fn qemu(self) -> &'static str {
        match self {
            Self::Amd64 => "qemu-x86_64-static",
            Self::Arm64 => "qemu-aarch64-static",
        }
    }

    /// `e_machine` in `elf.h`.
    pub(super) const fn elf_machine(self) -> u16 {
        match self {
            Self::Amd64 => 62,
            Self::Arm64 => 183,
        }
    }
}

impl fmt::Display for Arch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What to build, as `--arch` has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Arches(pub(crate) Vec<Arch>);

impl FromStr for Arches {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "all" => Ok(Self(Arch::ALL.to_vec())),
            "amd64" | "x86_64" => Ok(Self(vec![Arch::Amd64])),
            "arm64" | "aarch64" => Ok(Self(vec![Arch::Arm64])),
            "arm" | "arm32" | "armv6" | "armv7" | "armhf" | "armel" | "386" | "i386" | "i686" => Err(
                "32-bit systems are not supported, because the maps that the agent shares with the kernel are laid out for 64 bits: \
                 write amd64, arm64 or all; a Raspberry Pi 3 or newer runs a 64-bit operating system, for which arm64 is right"
                    .to_owned(),
            ),
            _ => Err("write amd64, arm64 or all: nothing else is supported".to_owned()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn architectures_are_read_and_small_ones_refused() {
        assert_eq!("all".parse(), Ok(Arches(vec![Arch::Amd64, Arch::Arm64])));
        assert_eq!("arm64".parse(), Ok(Arches(vec![Arch::Arm64])));
        for small in ["arm", "armv7", "armhf", "i386"] {
            let why = small.parse::<Arches>().expect_err("32 bits");
            assert!(why.contains("64-bit operating system"), "{why}");
            assert!(why.contains("write amd64, arm64 or all"), "{why}");
            assert!(!why.contains('\n'), "{why}");
        }
        for unknown in ["s390x", "riscv64", ""] {
            let why = unknown.parse::<Arches>().expect_err("unknown");
            assert!(why.contains("amd64, arm64 or all"), "{why}");
        }
    }
}
