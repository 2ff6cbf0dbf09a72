//! What clients are told: quorum, and the groups' views and messages, of recorded views only.
//!
//! Clients decide with them too: a lock manager that is given a view passes locks on in it, a service manager starts services. What is
//! passed on in a view that nobody has recorded is not known to a later side which that view does not pass by: it would take a lock for
//! the first holder's, and give it away with that one's replay while the second one's journal is not replayed.
//!
//! Until a view is recorded the clients go on in the one before: they lose no quorum, and nothing stops but what needs the new view.

use super::NodeAction;
use crate::ipc::ClusterEvent;

#[derive(Debug, Default)]
pub(super) struct Told {
    /// Clients take this node for quorate. Ends with quorum; begins in a recorded view.
    quorate: bool,
    /// Events of a quorate view that is not recorded yet, in order.
    held: Vec<(Vec<u32>, ClusterEvent)>,
}

impl Told {
    pub(super) const fn is_quorate(&self) -> bool {
        self.quorate
    }

    /// `quorate`, `recorded`: the present view.
    pub(super) fn event(
        &mut self,
        clients: Vec<u32>,
        event: ClusterEvent,
        (quorate, recorded): (bool, bool),
        out: &mut Vec<NodeAction>,
    ) {
        self.held.push((clients, event));
        if !quorate || recorded {
            self.release(out);
        }
    }

    /// There is no quorum, which clients have been told: what they hear now they may not act on.
    pub(super) fn lost(&mut self, out: &mut Vec<NodeAction>) {
        self.quorate = false;
        self.release(out);
    }

    /// The present view is quorate and recorded. Quorum is to be told behind what was held: that may be what begins with it.
    pub(super) fn recorded(&mut self, out: &mut Vec<NodeAction>) {
        self.quorate = true;
        self.release(out);
    }

    fn release(&mut self, out: &mut Vec<NodeAction>) {
        out.extend(self.held.drain(..).map(|(clients, event)| NodeAction::ToClients { clients, event }));
    }
}
