//! The same situations in the other family: every address becomes one with the same last 32 bits.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{Ipv4Net, Ipv6Net};
use serde_json::Value;

use super::Situation;

/// Bits in front of the IPv4 address.
const PREFIX: u8 = 96;

/// The situation with IPv6 in place of IPv4, everywhere.
pub(crate) fn to_ipv6(situation: &Situation) -> Situation {
    Situation {
        want: turned(&situation.want),
        have: turned(&situation.have),
    }
}

fn turned<T: serde::Serialize + serde::de::DeserializeOwned>(of: &T) -> T {
    let mut value = serde_json::to_value(of).expect("plain data");
    turn(&mut value);
    serde_json::from_value(value).expect("plain data")
}

fn turn(value: &mut Value) {
    match value {
        Value::String(text) => {
            if let Some(turned) = address(text) {
                *text = turned;
            }
        }
        Value::Array(items) => items.iter_mut().for_each(turn),
        Value::Object(fields) => {
            let taken = std::mem::take(fields);
            for (key, mut value) in taken {
                turn(&mut value);
                if key == "subnet_len"
                    && let Some(length) = value.as_u64()
                {
                    value = (length + u64::from(PREFIX)).into();
                }
                fields.insert(address(&key).unwrap_or(key), value);
            }
        }
        _ => {}
    }
}

/// An address, or one with a prefix length, in the other family.
fn address(text: &str) -> Option<String> {
    if let Ok(IpAddr::V4(address)) = text.parse() {
        return Some(wide(address).to_string());
    }
    let net: Ipv4Net = text.parse().ok()?;
    let length = net.prefix_len() + PREFIX;
    Some(Ipv6Net::new(wide(net.addr()), length).ok()?.to_string())
}

fn wide(address: Ipv4Addr) -> Ipv6Addr {
    let network = u128::from_be_bytes([0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    (network | u128::from(u32::from(address))).into()
}
