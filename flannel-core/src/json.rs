//! JSON objects the way Go's `encoding/json` reads them into a struct: keys match without regard to case, unknown
//! keys are ignored, of keys that occur twice the last wins, and `null` changes nothing.

use std::fmt;

use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};

/// A JSON value that remembers the order of its keys, which decides between duplicates.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Json {
    Null,
    Bool(bool),
    /// An integer that fits in 64 bits, written without fraction and exponent.
    Unsigned(u64),
    Negative(i64),
    /// Any other number.
    Float(f64),
    String(String),
    Array(Vec<Json>),
    Object(Object),
}

impl Json {
    /// Reads one whole document.
    pub(crate) fn parse(text: &str) -> Result<Json, serde_json::Error> {
        serde_json::from_str(text)
    }

    /// The kind of value, with its article, for "wants X, not Y".
    pub(crate) fn kind(&self) -> &'static str {
        match self {
            Json::Null => "null",
            Json::Bool(_) => "a boolean",
            Json::Unsigned(_) | Json::Negative(_) | Json::Float(_) => "a number",
            Json::String(_) => "a string",
            Json::Array(_) => "an array",
            Json::Object(_) => "an object",
        }
    }
}

/// Compact JSON, cut short: it is for error messages, which have one line.
impl fmt::Display for Json {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Json::Null => f.write_str("null"),
            Json::Bool(value) => value.fmt(f),
            Json::Unsigned(value) => value.fmt(f),
            Json::Negative(value) => value.fmt(f),
            Json::Float(value) => fmt::Debug::fmt(value, f),
            Json::String(value) => fmt::Debug::fmt(value, f),
            Json::Array(_) => f.write_str("[…]"),
            Json::Object(_) => f.write_str("{…}"),
        }
    }
}

/// The members of a JSON object in the order of the text, duplicates included.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Object(Vec<(String, Json)>);

impl Object {
    /// The value that a Go struct field called `name` ends up with. `None` when the key is absent or only ever null.
    pub(crate) fn get(&self, name: &str) -> Option<&Json> {
        let named = |(key, value): &&(String, Json)| *value != Json::Null && same_key(key, name);
        self.0.iter().rev().find(named).map(|(_, value)| value)
    }
}

/// Compares keys as Go does: ASCII case is folded, and so are the two letters outside ASCII that fold into it.
fn same_key(key: &str, name: &str) -> bool {
    let fold = |c: char| match c {
        '\u{17f}' => 's',
        '\u{212a}' => 'k',
        c => c.to_ascii_lowercase(),
    };
    key.chars().map(fold).eq(name.chars().map(fold))
}

impl<'de> Deserialize<'de> for Json {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(JsonVisitor)
    }
}

struct JsonVisitor;

impl<'de> Visitor<'de> for JsonVisitor {
    type Value = Json;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Json, E> {
        Ok(Json::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Json, E> {
        Ok(Json::Bool(value))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Json, E> {
        Ok(Json::Unsigned(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Json, E> {
        Ok(Json::Negative(value))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Json, E> {
        Ok(Json::Float(value))
    }

    fn visit_str<E>(self, value: &str) -> Result<Json, E> {
        Ok(Json::String(value.to_owned()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Json, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = seq.next_element()? {
            items.push(item);
        }
        Ok(Json::Array(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Json, A::Error> {
        let mut members = Vec::new();
        while let Some(member) = map.next_entry()? {
            members.push(member);
        }
        Ok(Json::Object(Object(members)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn object(text: &str) -> Object {
        match Json::parse(text).unwrap() {
            Json::Object(object) => object,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn keys_follow_go() {
        let cases = [
            (r#"{"Network":"a"}"#, Some("a")),
            (r#"{"network":"a"}"#, Some("a")),
            (r#"{"NETWORK":"a"}"#, Some("a")),
            ("{\"networ\u{212a}\":\"a\"}", Some("a")),
            (r#"{"network":"a","Network":"b"}"#, Some("b")),
            (r#"{"Network":"b","network":"a"}"#, Some("a")),
            (r#"{"Network":"a","Network":null}"#, Some("a")),
            (r#"{"Network":null}"#, None),
            (r#"{"Networks":"a"}"#, None),
            ("{}", None),
        ];
        for (text, expected) in cases {
            let expected = expected.map(|text| Json::String(text.to_owned()));
            assert_eq!(object(text).get("Network"), expected.as_ref(), "{text}");
        }
    }

    #[test]
    fn values_print_on_one_line() {
        let cases = [
            ("null", "null"),
            ("true", "true"),
            ("-1", "-1"),
            ("1.0", "1.0"),
            ("\"a\\nb\"", "\"a\\nb\""),
            ("[1,2]", "[…]"),
            ("{\"a\":1}", "{…}"),
        ];
        for (text, printed) in cases {
            assert_eq!(Json::parse(text).unwrap().to_string(), printed);
        }
    }
}
