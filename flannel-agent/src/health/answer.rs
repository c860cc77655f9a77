//! What is answered to whom: upstream's words, and behind them what upstream does not tell.

use super::{Lacking, Notes, Part};
use crate::telemetry::one_line;

/// A status code of HTTP and a body.
pub(super) type Answer = (u16, String);

/// `/healthz` and `/livez`: the process lives (upstream: main.go, `mustRunHealthz`).
pub(super) fn alive(name: &str, verbose: bool) -> Answer {
    let text = if verbose {
        format!("[+]ping ok\n{name} check passed\n")
    } else {
        "flanneld is running".to_owned()
    };
    (200, text)
}

/// `/readyz`: whether pods can talk, and else what is lacking.
pub(super) fn ready(lacking: &Lacking, notes: &Notes, verbose: bool) -> Answer {
    let status = if lacking.is_empty() { 200 } else { 503 };
    if verbose {
        let others = lacking.keys().filter(|part| !Part::ALL.contains(part));
        let mut lines: Vec<String> = Part::ALL
            .iter()
            .chain(others)
            .map(|part| match lacking.get(part) {
                None => match notes.get(part) {
                    None => format!("[+]{} ok", part.as_str()),
                    Some(note) => format!("[+]{} ok: {}", part.as_str(), one_line(note)),
                },
                Some(why) => format!("[-]{} failed: {}", part.as_str(), one_line(why)),
            })
            .collect();
        let verdict = if status == 200 { "passed" } else { "failed" };
        lines.push(format!("readyz check {verdict}\n"));
        return (status, lines.join("\n"));
    }
    if lacking.is_empty() {
        return (status, "flanneld is ready".to_owned());
    }
    let mut lines = vec!["flanneld is not ready yet".to_owned()];
    lines.extend(
        lacking
            .iter()
            .map(|(part, why)| format!("{}: {}", part.as_str(), one_line(why))),
    );
    (status, lines.join("\n") + "\n")
}

/// Whether a query asks for details, as kube-apiserver reads it: the name alone counts, whatever its value.
pub(super) fn is_verbose(query: Option<&str>) -> bool {
    query
        .into_iter()
        .flat_map(|query| query.split('&'))
        .any(|pair| pair.split('=').next() == Some("verbose"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readiness_has_upstreams_words_first() {
        assert_eq!(
            ready(&Lacking::new(), &Notes::new(), false),
            (200, "flanneld is ready".to_owned())
        );
        let lacking = Lacking::from([
            (Part::SubnetFile, "not yet".to_owned()),
            (Part::Lease, "no free\nsubnet".to_owned()),
        ]);
        let text = "flanneld is not ready yet\nlease: no free\\nsubnet\nsubnet-file: not yet\n";
        assert_eq!(
            ready(&lacking, &Notes::new(), false),
            (503, text.to_owned())
        );
    }

    #[test]
    fn details_are_in_the_apiservers_form() {
        let lacking = Lacking::from([(Part::Lease, "gone".to_owned())]);
        let text = "[+]uplink ok\n[+]network-config ok\n[-]lease failed: gone\n[+]datapath ok\n\
                    [+]firewall ok\n[+]subnet-file ok\nreadyz check failed\n";
        assert_eq!(ready(&lacking, &Notes::new(), true), (503, text.to_owned()));
        let (status, text) = ready(&Lacking::new(), &Notes::new(), true);
        assert_eq!(status, 200);
        assert!(
            text.ends_with("[+]subnet-file ok\nreadyz check passed\n"),
            "{text}"
        );
        let notes = Notes::from([(Part::Lease, "as last known".to_owned())]);
        let (status, text) = ready(&Lacking::new(), &notes, true);
        assert_eq!(status, 200);
        assert!(text.contains("[+]lease ok: as last known\n"), "{text}");
    }

    #[test]
    fn liveness_is_upstreams() {
        let text = "flanneld is running".to_owned();
        assert_eq!(alive("healthz", false), (200, text));
        let text = "[+]ping ok\nlivez check passed\n".to_owned();
        assert_eq!(alive("livez", true), (200, text));
    }

    #[test]
    fn the_name_alone_asks_for_details() {
        for query in [
            "verbose",
            "verbose=",
            "verbose=0",
            "x=1&verbose",
            "verbose&x",
        ] {
            assert!(is_verbose(Some(query)), "{query}");
        }
        for query in ["", "verbos", "x=verbose", "Verbose"] {
            assert!(!is_verbose(Some(query)), "{query}");
        }
        assert!(!is_verbose(None));
    }
}
