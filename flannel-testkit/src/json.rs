//! The JSON output of `ip` and `bpftool`.

use crate::netns::Netns;
use anyhow::Context as _;
use serde_json::Value;

/// Runs `ip -j <args>` in `ns`. No output, which `ip` gives for an empty list, is `null`.
pub fn ip_json(ns: &Netns, args: &[&str]) -> anyhow::Result<Value> {
    parse(&ns.exec(["ip", "-j"].iter().chain(args))?, "ip", args)
}

/// Runs `bridge -j <args>` in `ns`.
pub fn bridge_json(ns: &Netns, args: &[&str]) -> anyhow::Result<Value> {
    parse(
        &ns.exec(["bridge", "-j"].iter().chain(args))?,
        "bridge",
        args,
    )
}

/// Runs `bpftool -j <args>` in `ns`.
pub fn bpftool_json(ns: &Netns, args: &[&str]) -> anyhow::Result<Value> {
    parse(
        &ns.exec(["bpftool", "-j"].iter().chain(args))?,
        "bpftool",
        args,
    )
}

/// Runs `nft -j <args>` in `ns`.
pub fn nft_json(ns: &Netns, args: &[&str]) -> anyhow::Result<Value> {
    parse(&ns.exec(["nft", "-j"].iter().chain(args))?, "nft", args)
}

/// The details and counters of one device (`ip -d -s -j link show dev`).
pub fn link(ns: &Netns, ifname: &str) -> anyhow::Result<Value> {
    let mut all = ip_json(ns, &["-d", "-s", "link", "show", "dev", ifname])?;
    let first = all.as_array_mut().and_then(Vec::pop);
    first.with_context(|| format!("no device {ifname} in {}", ns.name()))
}

fn parse(text: &str, program: &str, args: &[&str]) -> anyhow::Result<Value> {
    if text.trim().is_empty() {
        return Ok(Value::Null);
    }
    serde_json::from_str(text).with_context(|| format!("output of {program} -j {}", args.join(" ")))
}
