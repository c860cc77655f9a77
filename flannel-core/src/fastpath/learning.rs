//! Whether the gate learns anything.

use std::collections::BTreeMap;

use super::devices::Device;
use crate::addr::IfIndex;

/// The gate's counters, in packets since the maps were made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Sent through the stack with a tag.
    pub tagged: u64,
    /// Found behind it, untouched.
    pub confirmed: u64,
}

/// So many packets are enough: with a handful, one Service that translates them all would be an accusation.
const ENOUGH: u64 = 1000;

/// Names the devices on which a program of others keeps the gate from learning, if many packets were tagged since the last look
/// and not one was found again.
///
/// The kernel stores the class of a clsact filter that returns OK where the tag is. Without a program of others nothing is said:
/// then all these packets were translated, which is what the gate is there to find out.
pub fn cannot_learn(
    before: Tally,
    now: Tally,
    devices: &BTreeMap<IfIndex, Device>,
) -> Option<String> {
    let tagged = now.tagged.checked_sub(before.tagged)?;
    if tagged <= ENOUGH || now.confirmed != before.confirmed {
        return None;
    }
    let names: Vec<&str> = devices
        .values()
        .filter(|device| device.foreign_programs().next().is_some())
        .map(|device| device.name.as_str())
        .collect();
    (!names.is_empty()).then(|| {
        format!(
            "flow gate cannot learn on {}: a clsact program there returns OK",
            names.join(", ")
        )
    })
}
