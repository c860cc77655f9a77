//! Agents on machines that seem to lack something, and what they say about it.

use flannel_testkit::{AgentProcess, Confinement};

use crate::rig::{PATIENCE, Rig, agent_binary};

impl Rig {
    /// Like [`Rig::start_agent`] on a machine that seems to lack something.
    #[track_caller]
    pub(crate) fn start_confined(
        &mut self,
        node: usize,
        flags: &[&str],
        confinement: &Confinement<'_>,
    ) {
        self.reserve_subnet(node);
        let common = self.common_flags(node);
        let flags: Vec<&str> = common
            .iter()
            .map(String::as_str)
            .chain(flags.iter().copied())
            .collect();
        let agent =
            AgentProcess::spawn_confined(self.node(node), agent_binary(), &flags, &[], confinement)
                .unwrap_or_else(|error| panic!("start the agent of node {node}: {error:#}"));
        self.agents.insert(node, agent);
    }

    /// Starts an agent that is expected to end by itself, and gives its exit code and all it said.
    #[track_caller]
    pub(crate) fn run_to_end(
        &mut self,
        node: usize,
        flags: &[&str],
        confinement: &Confinement<'_>,
    ) -> (i32, String) {
        self.start_confined(node, flags, confinement);
        let agent = self.agent(node);
        let code = agent.wait(PATIENCE).expect("the agent ends");
        let said = agent.log();
        self.agents.remove(&node);
        (code, said)
    }
}

/// The lines of a log that a person should read.
pub(crate) fn complaints(log: &str) -> Vec<&str> {
    log.lines()
        .filter(|line| !line.contains(" INFO "))
        .collect()
}
