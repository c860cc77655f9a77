//! JSON as Go reads and writes it.

use serde::Serialize;
use serde_json::{Map, Value, ser::PrettyFormatter};

/// A JSON object. Its keys are sorted, as Go sorts those of a map.
pub(crate) type Object = Map<String, Value>;

/// One line, as `json.Marshal` writes it: besides what JSON asks for, Go escapes what means something in HTML.
pub(crate) fn compact(object: &Object) -> String {
    let text = Value::Object(object.clone()).to_string();
    // Outside strings JSON has none of these.
    text.replace('&', "\\u0026")
        .replace('<', "\\u003c")
        .replace('>', "\\u003e")
        .replace('\u{2028}', "\\u2028")
        .replace('\u{2029}', "\\u2029")
}

/// With libcni's indentation of four blanks.
pub(crate) fn pretty(value: &impl Serialize) -> String {
    let mut out = Vec::new();
    let format = PrettyFormatter::with_indent(b"    ");
    let mut serializer = serde_json::Serializer::with_formatter(&mut out, format);
    match value.serialize(&mut serializer) {
        Ok(()) => String::from_utf8_lossy(&out).into_owned(),
        Err(error) => error.to_string(),
    }
}

/// A member as Go finds it for a field of a struct: without regard to case. `null` is as good as absent.
pub(crate) fn field<'a>(object: &'a Object, name: &str) -> Option<&'a Value> {
    object
        .get(name)
        .or_else(|| {
            let mut members = object.iter();
            members
                .find(|(key, _)| key.eq_ignore_ascii_case(name))
                .map(|(_, value)| value)
        })
        .filter(|value| !value.is_null())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn object(text: &str) -> Object {
        serde_json::from_str(text).unwrap()
    }

    #[test]
    fn keys_are_sorted_and_html_is_escaped() {
        assert_eq!(
            compact(&object(r#"{"b":1,"a":{"d":"<&>","c":null}}"#)),
            r#"{"a":{"c":null,"d":"\u003c\u0026\u003e"},"b":1}"#
        );
    }

    #[test]
    fn fields_fold_case_and_skip_null() {
        let object = object(r#"{"SubnetFile":"/a","dataDir":null}"#);
        assert_eq!(field(&object, "subnetFile"), Some(&Value::from("/a")));
        assert_eq!(field(&object, "dataDir"), None);
    }
}
