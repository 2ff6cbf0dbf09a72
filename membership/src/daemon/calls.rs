//! What local clients ask for.

use super::Wire;
use super::runtime::Runtime;
use crate::alive;
use crate::clock;
use crate::engine::{Engine, Guarantee};
use crate::event::GroupName;
use crate::groups::GroupError;
use crate::ipc::{
    Answer, Call, ClientKind, Command, MAX_MESSAGE, MAX_PAYLOAD, Reply, Request, Secret, VERSION, Welcome,
};
use bytes::Bytes;
use cairn_base::{Incarnation, NodeId, Proc};

/// Groups whose members write to the LUN, or run services: only nodes that can be fenced may join.
const WRITERS: [&str; 2] = ["gfs:", "rgmanager"];

impl<E: Engine, W: Wire> Runtime<E, W> {
    pub(super) fn call(&mut self, client: u32, call: Call) {
        let Some(state) = self.clients.get(&client) else { return };
        let known = state.kind.is_some();
        let id = call.id;
        let reply = match call.request {
            Request::Hello { version, kind, subscribe } => {
                if known {
                    Reply::Refused("hello was said already".to_owned())
                } else {
                    self.hello(client, id, version, kind, subscribe);
                    return;
                }
            }
            _ if !known => Reply::Refused("say hello first".to_owned()),
            Request::Status => Reply::Status(Box::new(self.status(clock::boottime()))),
            Request::Join { group, payload } => self.join(client, &group, payload),
            Request::Leave { group } => self.leave(client, &group),
            Request::Send { group, safe, data } => self.send(client, &group, safe, &data),
            Request::Command(command) => match self.command(client, command) {
                Ok(()) => Reply::Done,
                Err(why) => Reply::Refused(why),
            },
        };
        self.push(client, &Answer::Reply { id, reply });
    }

    fn hello(&mut self, client: u32, id: u64, version: u16, kind: ClientKind, subscribe: bool) {
        let refuse = |why: &str| Answer::Reply { id, reply: Reply::Refused(why.to_owned()) };
        if version != VERSION {
            let text = format!("cairnd speaks protocol version {VERSION}, this program {version}");
            return self.push(client, &refuse(&text));
        }
        let stopping = self.is_leaving() || self.stack.core.stopping().is_some();
        let is_mount = matches!(kind, ClientKind::Mount { .. });
        if stopping && kind != ClientKind::Tool {
            return self.push(client, &refuse("this node is leaving the cluster"));
        }
        let Some(state) = self.clients.get_mut(&client) else { return };
        if is_mount && state.process.is_none() {
            // its death could not be proved
            return self.push(client, &refuse("the process cannot be watched"));
        }
        state.kind = Some(kind);
        state.subscribed = subscribe;
        let welcome = Welcome {
            version: VERSION,
            proc: self.me,
            client,
            node_name: self.config.name_of(self.me.node.0),
            cluster_name: self.config.name.clone(),
            config_version: self.config.version,
            lock_key: if is_mount { self.lock_key.clone() } else { Secret::default() },
        };
        self.push(client, &Answer::Reply { id, reply: Reply::Welcome(welcome) });
        if subscribe {
            for event in self.stack.core.snapshot(clock::boottime()) {
                self.push(client, &Answer::Event(event));
            }
        }
    }

    fn join(&mut self, client: u32, group: &str, payload: Vec<u8>) -> Reply {
        let Some(name) = GroupName::new(group) else {
            return Reply::Refused(format!("a group name has 1 to {} bytes", GroupName::MAX));
        };
        if payload.len() > MAX_PAYLOAD {
            return Reply::Refused(format!("a payload has at most {MAX_PAYLOAD} bytes"));
        }
        if self.is_leaving() {
            return Reply::Refused("this node is leaving the cluster".to_owned());
        }
        let payload = Bytes::from(payload);
        if WRITERS.iter().any(|w| group.starts_with(w)) && !self.stack.core.may_join() {
            self.pending_joins.push((client, name, payload));
            return Reply::Done;
        }
        self.join_now(client, name, payload)
    }

    fn join_now(&mut self, client: u32, name: GroupName, payload: Bytes) -> Reply {
        match self.stack.groups.join(client, &name, payload) {
            Ok(()) => {
                if let Some(state) = self.clients.get_mut(&client) {
                    state.groups.insert(name);
                }
                Reply::Done
            }
            Err(e) => group_error(e),
        }
    }

    /// This node is in the fence domain: those who waited for that go on.
    pub(super) fn admit(&mut self) {
        for (client, name, payload) in std::mem::take(&mut self.pending_joins) {
            match self.join_now(client, name.clone(), payload.clone()) {
                Reply::Busy => self.pending_joins.push((client, name, payload)),
                Reply::Refused(why) => {
                    tracing::error!("client {client} cannot join {name}: {why}");
                    self.client_closed(client);
                }
                _ => {}
            }
        }
    }

    fn leave(&mut self, client: u32, group: &str) -> Reply {
        let Some(name) = GroupName::new(group) else { return Reply::Refused("no such group".to_owned()) };
        let waiting = self.pending_joins.len();
        self.pending_joins.retain(|(c, n, _)| *c != client || *n != name);
        if self.pending_joins.len() < waiting {
            return Reply::Done;
        }
        match self.stack.groups.leave(client, &name) {
            Ok(()) => {
                if let Some(state) = self.clients.get_mut(&client) {
                    state.groups.remove(&name);
                }
                Reply::Done
            }
            Err(e) => group_error(e),
        }
    }

    fn send(&mut self, client: u32, group: &str, safe: bool, data: &[u8]) -> Reply {
        let Some(name) = GroupName::new(group) else { return Reply::Refused("no such group".to_owned()) };
        if data.len() > MAX_MESSAGE {
            return Reply::Refused(format!("a message has at most {MAX_MESSAGE} bytes"));
        }
        let guarantee = if safe { Guarantee::Safe } else { Guarantee::Agreed };
        match self.stack.groups.mcast(client, &name, guarantee, data) {
            Ok(_) => Reply::Done,
            Err(e) => group_error(e),
        }
    }

    fn command(&mut self, client: u32, command: Command) -> Result<(), String> {
        let mut acts = Vec::new();
        let result = match command {
            Command::LeaveCluster { remove: true, .. } => {
                Err("leave remove is not offered: removed nodes could become quorate apart".to_owned())
            }
            Command::LeaveCluster { force, .. } => self.leave_cluster(force),
            Command::KillNode { node } => {
                self.id_of(&node).and_then(|id| self.stack.core.kill_node(id, &mut acts))
            }
            Command::FenceNode { node } => {
                self.id_of(&node).and_then(|id| self.stack.core.fence_node(id, &mut acts))
            }
            Command::FenceAckManual { node, force_unsafe } => self.id_of(&node).and_then(|id| {
                if !force_unsafe {
                    self.evidence_of_life(id)?;
                }
                let user = self.clients.get(&client).map_or(0, |c| c.pid);
                let user = format!("pid {user}");
                self.stack.core.acknowledge(id, user, clock::unix_seconds(), &mut acts)
            }),
            Command::SetExpected { votes } => self.stack.core.set_expected(votes, &mut acts),
        };
        self.perform(acts);
        result
    }

    fn id_of(&self, name: &str) -> Result<NodeId, String> {
        self.config.node_named(name).map(|n| NodeId(n.id)).map_err(|e| e.to_string())
    }

    fn leave_cluster(&mut self, force: bool) -> Result<(), String> {
        let mount = self.clients.values().find_map(|c| match &c.kind {
            Some(ClientKind::Mount { fs }) => Some(fs.clone()),
            _ => None,
        });
        if let Some(fs) = mount
            && !force
        {
            return Err(format!("found gfs2 file system {fs} mounted: cannot leave due to active systems"));
        }
        if self.is_leaving() {
            return Err("this node is leaving already".to_owned());
        }
        self.begin_leave();
        Ok(())
    }

    /// A person says that a node is dead: what this machine and the disk say against it.
    fn evidence_of_life(&self, id: NodeId) -> Result<(), String> {
        let name = self.config.name_of(id.0);
        if self.config.one_host
            && let Some(node) = self.config.node(id.0)
        {
            let life = self.stack.core.domain().victims_of(id).first().copied();
            let life = life.unwrap_or(Proc { node: id, incarnation: Incarnation(0) });
            if let Err(e) = alive::probe(&node.run_dir, life.incarnation) {
                return Err(format!("{name} is still running here ({e}); --force-unsafe overrides"));
            }
        }
        Ok(())
    }
}

fn group_error(e: GroupError) -> Reply {
    match e {
        GroupError::WouldBlock => Reply::Busy,
        e => Reply::Refused(e.to_string()),
    }
}
