//! How each process of a tree comes into its session. A session is only handed on at birth: a process can
//! leave for one of its own, but enters another's never.
//!
//! Read from: `/proc/PID/stat`. Rebuilt by: making each process at the moment in which its maker is in the
//! session; where nobody is, by a leader that then ends, whereupon the parent adopts the process.
//! Refused: what only a longer history of deaths could have made.

use std::collections::HashMap;

/// A process, as far as this goes.
#[derive(Debug, Clone, Copy)]
pub struct Kin {
    pub pid: i32,
    pub sid: i32,
    /// Its place; before its own.
    pub parent: Option<usize>,
    pub has_ended: bool,
}

/// How a process comes into its session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// It is in that of its parent, or leaves it for its own.
    Inherited,
    /// Its parent was in it before it left for its own.
    Earlier,
    /// Its leader made it and ended; its parent adopted it.
    Orphaned,
}

/// The way of each process, in the same order, or why there is none.
pub fn ways(kin: &[Kin]) -> Vec<Result<Way, String>> {
    // The session that each is born into, and who adopts the orphans of one.
    let mut born: Vec<i32> = Vec::with_capacity(kin.len());
    let mut adopters: HashMap<i32, usize> = HashMap::new();
    let places: HashMap<i32, usize> = kin.iter().enumerate().map(|(at, kin)| (kin.pid, at)).collect();
    let mut way = |at: usize, own: &Kin| {
        let Some(parent) = own.parent.filter(|parent| *parent < at) else {
            born.push(own.sid);
            return Ok(Way::Inherited);
        };
        let mother = &kin[parent];
        let wanted = if own.sid == own.pid { mother.sid } else { own.sid };
        let mothers_birth = born[parent];
        born.push(wanted);
        if wanted == mother.sid {
            return Ok(Way::Inherited);
        }
        if mother.sid == mother.pid && wanted == mothers_birth {
            return Ok(Way::Earlier);
        }
        let leader = places.get(&wanted).map(|at| &kin[*at]);
        let is_gone = leader.is_none_or(|leader| leader.has_ended && leader.parent == own.parent);
        // That of the root is somebody's outside.
        let is_ours = wanted != kin[0].sid || leader.is_some();
        if is_gone && is_ours && *adopters.entry(wanted).or_insert(parent) == parent {
            return Ok(Way::Orphaned);
        }
        Err(format!("its session {wanted} cannot be reached from its parent {}", mother.pid))
    };
    kin.iter().enumerate().map(|(at, own)| way(at, own)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kin(pid: i32, sid: i32, parent: usize) -> Kin {
        Kin { pid, sid, parent: (pid != 10).then_some(parent), has_ended: false }
    }

    #[test]
    fn children_are_in_the_session_of_their_parent_or_lead_one() {
        let ways = ways(&[kin(10, 10, 0), kin(11, 10, 0), kin(12, 12, 1), kin(13, 12, 2)]);
        assert!(ways.iter().all(|way| *way == Ok(Way::Inherited)), "{ways:?}");
    }

    #[test]
    fn a_child_made_before_its_parent_led_a_session_stays_behind() {
        let ways = ways(&[kin(10, 10, 0), kin(11, 11, 0), kin(12, 10, 1)]);
        assert_eq!(ways[2], Ok(Way::Earlier));
    }

    #[test]
    fn orphans_of_a_session_have_one_adopter() {
        let adopted = ways(&[kin(10, 10, 0), kin(12, 11, 0), kin(13, 11, 0), kin(14, 11, 1)]);
        assert_eq!(adopted, [Ok(Way::Inherited), Ok(Way::Orphaned), Ok(Way::Orphaned), Ok(Way::Inherited)]);
        let torn = ways(&[kin(10, 10, 0), kin(11, 10, 0), kin(13, 12, 0), kin(14, 12, 1)]);
        assert_eq!(torn[2], Ok(Way::Orphaned));
        assert!(torn[3].is_err());
    }

    #[test]
    fn a_leader_that_lives_elsewhere_is_in_the_way() {
        let ended = Kin { has_ended: true, ..kin(11, 11, 0) };
        assert_eq!(ways(&[kin(10, 10, 0), ended, kin(12, 11, 0)])[2], Ok(Way::Orphaned));
        assert!(ways(&[kin(10, 10, 0), kin(11, 11, 0), kin(12, 11, 0)])[2].is_err());
        let foreign = ways(&[kin(10, 5, 0), kin(11, 11, 0), kin(12, 5, 1), kin(13, 13, 1), kin(14, 5, 3)]);
        assert_eq!(foreign[2], Ok(Way::Earlier));
        assert!(foreign[4].is_err());
    }
}
