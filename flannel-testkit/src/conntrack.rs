//! Connection tracking of a namespace, through the `conntrack` program.

use crate::family::Family;
use crate::netns::Netns;
use anyhow::Context as _;
use std::net::{IpAddr, SocketAddr};

/// One way of a tracked connection. The ports of ICMP are zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tuple {
    pub from: SocketAddr,
    pub to: SocketAddr,
}

/// A tracked connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// `tcp`, `udp`, `icmp`, …
    pub protocol: String,
    /// Seconds until it is forgotten, unless another packet is seen.
    pub timeout: u64,
    /// TCP's state, empty for others.
    pub state: String,
    /// As its first packet went.
    pub original: Tuple,
    /// As the answers come.
    pub reply: Tuple,
    /// No answer has been seen.
    pub unreplied: bool,
    /// It is not dropped early when the table is full.
    pub assured: bool,
}

impl Entry {
    /// Whether addresses or ports are translated.
    pub fn is_translated(&self) -> bool {
        self.original.from != self.reply.to || self.original.to != self.reply.from
    }

    /// Whether one of its ways ends here.
    pub fn touches(&self, address: SocketAddr) -> bool {
        [self.original, self.reply]
            .iter()
            .any(|way| way.from == address || way.to == address)
    }
}

/// Everything that is tracked in IPv4 (`conntrack -L -o extended`).
pub fn list(ns: &Netns) -> anyhow::Result<Vec<Entry>> {
    list_of(ns, Family::V4)
}

/// Everything that is tracked in a family.
pub fn list_of(ns: &Netns, family: Family) -> anyhow::Result<Vec<Entry>> {
    let text = ns.exec(["conntrack", "-L", "-f", name(family), "-o", "extended"])?;
    text.lines()
        .map(|line| parse(line).with_context(|| format!("conntrack said {line:?}")))
        .collect()
}

/// Forgets everything, in both families (`conntrack -F`).
pub fn flush(ns: &Netns) -> anyhow::Result<()> {
    for family in Family::ALL {
        ns.exec(["conntrack", "-F", "-f", name(family)])?;
    }
    Ok(())
}

/// Forgets the connections of `protocol` whose first packet came from `source`. None is no error.
pub fn delete(ns: &Netns, protocol: &str, source: SocketAddr) -> anyhow::Result<()> {
    let (ip, port) = (source.ip().to_string(), source.port().to_string());
    let argv = [
        "conntrack",
        "-D",
        "-f",
        name(Family::of(source.ip())),
        "-p",
        protocol,
        "-s",
        &ip,
        "--sport",
        &port,
    ];
    let done = crate::process::finish(
        ns.command(argv[0]).args(&argv[1..]),
        crate::netns::COMMAND_LIMIT,
    )?;
    // It fails when there was nothing to delete.
    anyhow::ensure!(
        done.status.success() || done.stderr.contains("0 flow entries"),
        "{argv:?}: {}",
        done.stderr.trim()
    );
    Ok(())
}

/// What the program calls a family.
fn name(family: Family) -> &'static str {
    match family {
        Family::V4 => "ipv4",
        Family::V6 => "ipv6",
    }
}

/// One line such as `ipv4 2 tcp 6 431999 ESTABLISHED src=… dst=… sport=… dport=… src=… dst=… sport=… dport=… [ASSURED] …`.
fn parse(line: &str) -> anyhow::Result<Entry> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let first = words
        .iter()
        .position(|word| word.starts_with("src="))
        .context("no addresses")?;
    let (protocol, timeout) = (words.get(2), words.get(4));
    let pairs: Vec<(&str, &str)> = words[first..]
        .iter()
        .filter_map(|word| word.split_once('='))
        .collect();
    let second = pairs
        .iter()
        .rposition(|(key, _)| *key == "src")
        .context("one way only")?;
    let (original, reply) = pairs.split_at(second);
    Ok(Entry {
        protocol: (*protocol.context("no protocol")?).to_owned(),
        timeout: timeout.context("no timeout")?.parse().context("timeout")?,
        state: words[5..first].join(" "),
        original: tuple(original)?,
        reply: tuple(reply)?,
        unreplied: words.contains(&"[UNREPLIED]"),
        assured: words.contains(&"[ASSURED]"),
    })
}

fn tuple(pairs: &[(&str, &str)]) -> anyhow::Result<Tuple> {
    let value = |key: &str| {
        let found = pairs.iter().find(|(name, _)| *name == key);
        found.map(|(_, value)| *value)
    };
    let end = |ip: &str, port: &str| -> anyhow::Result<SocketAddr> {
        let ip: IpAddr = value(ip).context("no address")?.parse()?;
        Ok(SocketAddr::new(ip, value(port).unwrap_or("0").parse()?))
    };
    Ok(Tuple {
        from: end("src", "sport")?,
        to: end("dst", "dport")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_the_program_are_understood() {
        let tcp = parse(
            "ipv4     2 tcp      6 431999 ESTABLISHED src=10.244.1.2 dst=10.96.0.10 sport=41000 dport=80 \
             src=10.244.2.2 dst=10.244.1.2 sport=8080 dport=41000 [ASSURED] mark=0 use=1",
        )
        .unwrap();
        assert_eq!((tcp.protocol.as_str(), tcp.timeout), ("tcp", 431_999));
        assert_eq!(tcp.state, "ESTABLISHED");
        assert!(tcp.assured && !tcp.unreplied && tcp.is_translated());
        assert!(tcp.touches("10.244.2.2:8080".parse().unwrap()));
        let udp = parse(
            "ipv4     2 udp      17 29 src=10.244.1.2 dst=10.244.2.2 sport=1 dport=2 [UNREPLIED] \
             src=10.244.2.2 dst=10.244.1.2 sport=2 dport=1 mark=0 use=1",
        )
        .unwrap();
        assert!(udp.state.is_empty() && udp.unreplied && !udp.assured && !udp.is_translated());
        let icmp = parse(
            "ipv4     2 icmp     1 29 src=10.0.0.1 dst=10.0.0.2 type=8 code=0 id=5 src=10.0.0.2 dst=10.0.0.1 type=0 code=0 id=5 mark=0 use=1",
        )
        .unwrap();
        assert_eq!(icmp.original.from.port(), 0);
        let six = parse(
            "ipv6     10 tcp      6 7439 ESTABLISHED src=fd00:10:244:1::2 dst=fd00:10:244:2::2 sport=4 dport=80 \
             src=fd00:10:244:2::2 dst=fd00:10:244:1::2 sport=80 dport=4 [ASSURED] mark=0 use=1",
        )
        .unwrap();
        assert!(six.touches("[fd00:10:244:2::2]:80".parse().unwrap()) && !six.is_translated());
        assert!(parse("nothing").is_err());
    }
}
