//! What this can be built for. Every other crate of ours depends on this one, so that nothing else is said before.

#[cfg(not(target_pointer_width = "64"))]
compile_error!(
    "flannel-ebpf is not for 32-bit targets: the maps that the agent shares with the kernel are laid out for 64 bits; build for x86_64 (amd64) or aarch64 (arm64): a Raspberry Pi 3 or newer runs a 64-bit operating system"
);

#[cfg(not(target_endian = "little"))]
compile_error!(
    "flannel-ebpf is not for big-endian targets: its eBPF object is little-endian; build for x86_64 (amd64) or aarch64 (arm64)"
);
