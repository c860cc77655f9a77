//! Peers that have just left. A lease that was revoked, or a file that was written by delete and create, is often back within
//! moments; taking the peer down in between would cut connections for nothing.
//!
//! Time comes in from outside, as the span since any fixed moment.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use ipnet::IpNet;

use crate::plan::{Peer, overlap};

/// How long a peer stays after its lease is gone. Short enough that one which really leaves is gone within two seconds.
pub const GRACE: Duration = Duration::from_millis(700);

/// The peers that have left and may come back.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Farewell {
    leaving: BTreeMap<IpNet, (Peer, Duration)>,
}

impl Farewell {
    /// The peers to program at `now`: those `present`, and of those in `before` the ones that left less than [`GRACE`] ago and whose
    /// place nobody has taken, be it the subnet, the MAC address or the VTEP.
    pub fn extend(
        &mut self,
        before: &BTreeMap<IpNet, Peer>,
        mut present: BTreeMap<IpNet, Peer>,
        own: &BTreeSet<IpNet>,
        now: Duration,
    ) -> BTreeMap<IpNet, Peer> {
        for (subnet, peer) in before {
            self.leaving.entry(*subnet).or_insert((*peer, now + GRACE));
        }
        self.leaving.retain(|subnet, (peer, end)| {
            *end > now
                && !own.iter().any(|own| overlap(own, subnet))
                && !present.iter().any(|(other, new)| {
                    overlap(other, subnet) || new.mac == peer.mac || new.vtep == peer.vtep
                })
        });
        for (subnet, (peer, _)) in &self.leaving {
            present.insert(*subnet, *peer);
        }
        present
    }

    /// When [`Farewell::extend`] will next have something to let go.
    pub fn due(&self) -> Option<Duration> {
        self.leaving.values().map(|(_, end)| *end).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn net(text: &str) -> IpNet {
        text.parse().unwrap()
    }

    fn peer(number: u8) -> Peer {
        Peer {
            mac: Some([2, 0, 0, 0, 0, number].into()),
            vtep: [192, 168, 0, number].into(),
        }
    }

    fn peers(list: &[(&str, u8)]) -> BTreeMap<IpNet, Peer> {
        list.iter()
            .map(|(subnet, number)| (net(subnet), peer(*number)))
            .collect()
    }

    #[test]
    fn who_comes_back_was_never_gone() {
        let mut farewell = Farewell::default();
        let both = peers(&[("10.5.1.0/24", 1), ("10.5.2.0/24", 2)]);
        let one = peers(&[("10.5.1.0/24", 1)]);
        let own = BTreeSet::new();
        let kept = farewell.extend(&both, one, &own, Duration::ZERO);
        assert_eq!(kept, both);
        assert_eq!(farewell.due(), Some(GRACE));
        assert_eq!(farewell.extend(&kept, both.clone(), &own, 300 * MS), both);
        assert_eq!(farewell.due(), None);
    }

    #[test]
    fn who_stays_away_goes_at_the_first_end() {
        let mut farewell = Farewell::default();
        let both = peers(&[("10.5.1.0/24", 1), ("10.5.2.0/24", 2)]);
        let one = peers(&[("10.5.1.0/24", 1)]);
        let own = BTreeSet::new();
        let mut kept = farewell.extend(&both, one.clone(), &own, Duration::ZERO);
        // Looking again does not prolong it.
        for at in 1..7 {
            kept = farewell.extend(&kept, one.clone(), &own, at * 100 * MS);
            assert_eq!(kept, both, "at {at}");
        }
        assert_eq!(farewell.extend(&kept, one.clone(), &own, GRACE), one);
        assert_eq!(farewell.due(), None);
    }

    #[test]
    fn a_taken_place_is_given_up_at_once() {
        let before = peers(&[("10.5.2.0/24", 2)]);
        let cases = [
            ("10.5.2.0/23", 3, "subnet"),
            ("10.5.9.0/24", 2, "MAC and VTEP"),
        ];
        for (subnet, number, what) in cases {
            let present = peers(&[(subnet, number)]);
            let mut farewell = Farewell::default();
            assert_eq!(
                farewell.extend(&before, present.clone(), &BTreeSet::new(), MS),
                present,
                "{what}"
            );
        }
        let own = BTreeSet::from([net("10.5.2.0/24")]);
        assert_eq!(
            Farewell::default().extend(&before, BTreeMap::new(), &own, MS),
            BTreeMap::new()
        );
    }
}
