//! How clients are told the way: kubeconfig files, and the files of a service account in a pod.

use super::tls::Identity;

/// By what a kubeconfig proves who asks.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Proof<'a> {
    Token(&'a str),
    Certificate(&'a Identity),
    Nothing,
}

/// The text of a kubeconfig with one cluster, user and context.
pub(crate) fn text(url: &str, ca: &str, proof: Proof<'_>) -> String {
    let user = match proof {
        Proof::Token(token) => format!("{{token: {token}}}"),
        Proof::Certificate(identity) => format!(
            "{{client-certificate-data: {}, client-key-data: {}}}",
            base64(identity.certificate.as_bytes()),
            base64(identity.key.as_bytes())
        ),
        Proof::Nothing => "{}".into(),
    };
    format!(
        "apiVersion: v1\n\
         kind: Config\n\
         clusters:\n\
         - name: lab\n\
         \x20 cluster: {{server: \"{url}\", certificate-authority-data: {}}}\n\
         users:\n\
         - name: lab\n\
         \x20 user: {user}\n\
         contexts:\n\
         - name: lab\n\
         \x20 context: {{cluster: lab, user: lab}}\n\
         current-context: lab\n",
        base64(ca.as_bytes())
    )
}

fn base64(bytes: &[u8]) -> String {
    const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::new();
    for chunk in bytes.chunks(3) {
        let mut three = [0; 3];
        three[..chunk.len()].copy_from_slice(chunk);
        let bits = u32::from_be_bytes([0, three[0], three[1], three[2]]);
        for place in 0..4 {
            let letter = LETTERS[(bits >> (18 - 6 * place) & 63) as usize];
            text.push(if place > chunk.len() {
                '='
            } else {
                letter.into()
            });
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::base64;

    /// The vectors of RFC 4648.
    #[test]
    fn base64_is_that_of_the_rfc() {
        for (bytes, text) in [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foob", "Zm9vYg=="),
            ("fooba", "Zm9vYmE="),
            ("foobar", "Zm9vYmFy"),
        ] {
            assert_eq!(base64(bytes.as_bytes()), text);
        }
    }
}
