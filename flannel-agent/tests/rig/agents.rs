//! Agents of a lab by the number of their node, as rigs with a real lease store have them.

use std::{collections::BTreeMap, time::Duration};

use flannel_testkit::AgentProcess;

use super::PATIENCE;

/// The agents that run. Killed when dropped, and what they said is printed when a test panics.
#[derive(Default)]
pub(crate) struct Agents(BTreeMap<usize, AgentProcess>);

impl Agents {
    pub(crate) fn insert(&mut self, node: usize, agent: AgentProcess) {
        self.0.insert(node, agent);
    }

    /// The nodes that have one.
    pub(crate) fn nodes(&self) -> Vec<usize> {
        self.0.keys().copied().collect()
    }

    #[track_caller]
    pub(crate) fn agent(&mut self, node: usize) -> &mut AgentProcess {
        self.0.get_mut(&node).expect("an agent on the node")
    }

    #[track_caller]
    pub(crate) fn wait_ready(&mut self, node: usize) {
        self.wait_log(node, "flannel is ready");
    }

    #[track_caller]
    pub(crate) fn wait_log(&mut self, node: usize, needle: &str) {
        if let Err(error) = self.agent(node).wait_log(needle, PATIENCE) {
            panic!("node {node}: {error:#}");
        }
    }

    /// How many lines of a node's agent contain `needle`.
    #[track_caller]
    pub(crate) fn lines(&mut self, node: usize, needle: &str) -> usize {
        let log = self.agent(node).log();
        log.lines().filter(|line| line.contains(needle)).count()
    }

    /// Ends an agent with a signal, and gives its exit code.
    #[track_caller]
    pub(crate) fn end(&mut self, node: usize, signal: i32, within: Duration) -> i32 {
        let agent = self.agent(node);
        agent.signal(signal).expect("send a signal");
        let code = agent.wait(within).expect("an end in time");
        self.0.remove(&node);
        code
    }

    /// Kills an agent as a crash would.
    #[track_caller]
    pub(crate) fn kill_agent(&mut self, node: usize) {
        self.agent(node).sigkill();
        self.0.remove(&node);
    }

    /// Fails if an agent has ended.
    #[track_caller]
    pub(crate) fn all_run(&mut self) {
        for (node, agent) in &mut self.0 {
            assert!(
                agent.is_running(),
                "the agent of node {node} ended:\n{}",
                agent.log()
            );
        }
    }
}

impl Drop for Agents {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for (node, agent) in &self.0 {
                eprintln!("--- the agent of node {node} said:\n{}", agent.log());
            }
        }
    }
}

/// Gives a rig the methods of the [`Agents`] in its field `agents`.
macro_rules! with_agents {
    ($rig:ty) => {
        impl std::ops::Deref for $rig {
            type Target = crate::rig::agents::Agents;

            fn deref(&self) -> &Self::Target {
                &self.agents
            }
        }

        impl std::ops::DerefMut for $rig {
            fn deref_mut(&mut self) -> &mut Self::Target {
                &mut self.agents
            }
        }
    };
}

pub(crate) use with_agents;
