//! The measuring itself: all rigs side by side, taking turns.

use std::{collections::BTreeMap, thread, time::Duration};

use anyhow::Context as _;

use crate::{
    check_stop,
    cluster::Backend,
    meter::Meter,
    mode::Mode,
    result::{BASES, BASES_HOST_GW, Samples},
    rig::{Plan, Rig, Wire},
    stats,
    workload::{Kind, Load, Workload},
};

/// After the uplinks have changed: the agents look at them again.
const SETTLE: Duration = Duration::from_millis(500);
/// Failures of one mode in one workload after which it is left out of that workload.
const CHANCES: usize = 2;

/// Rounds and lengths.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// Rounds; each has one sample of every mode.
    pub rounds: usize,
    /// Length of a sample.
    pub length: Duration,
}

/// Rigs that stand side by side, and what was measured on them.
#[derive(Debug)]
pub struct Session {
    rigs: Vec<Rig>,
    wire: Wire,
    /// What the others are compared with.
    bases: [&'static str; 2],
    /// All values so far.
    pub samples: Samples,
    /// What did not work.
    pub failures: Vec<String>,
}

impl Session {
    /// Builds all modes.
    pub fn build(modes: &[Mode], plan: &Plan, meter: &mut Meter) -> anyhow::Result<Self> {
        let mut rigs = Vec::new();
        for mode in modes {
            check_stop()?;
            meter.stage(&format!("building {}", mode.name));
            rigs.push(Rig::build(*mode, &plan.for_mode(mode))?);
        }
        for rig in &rigs {
            rig.set_wire(Wire::SuperPackets)?;
        }
        Ok(Self {
            rigs,
            wire: Wire::SuperPackets,
            bases: match plan.backend {
                Backend::HostGw => BASES_HOST_GW,
                Backend::Vxlan | Backend::Wireguard => BASES,
            },
            samples: Samples::default(),
            failures: Vec::new(),
        })
    }

    /// The rigs.
    pub fn rigs(&self) -> &[Rig] {
        &self.rigs
    }

    /// Runs one workload on all modes that can, round by round.
    pub fn run(
        &mut self,
        workload: &Workload,
        pace: Pace,
        meter: &mut Meter,
    ) -> anyhow::Result<()> {
        self.set_wire(workload.wire)?;
        let able: Vec<usize> = (0..self.rigs.len())
            .filter(|index| workload.runs_on(self.rigs[*index].mode))
            .collect();
        let load = self.load(workload, pace, meter)?;
        let mut failed: BTreeMap<usize, usize> = BTreeMap::new();
        meter.stage(workload.name);
        for round in 0..pace.rounds {
            for turn in stats::order(round, able.len()) {
                check_stop()?;
                let index = able[turn];
                let rig = &self.rigs[index];
                let name = rig.mode.name;
                meter.step(&format!("round {} of {}, {name}", round + 1, pace.rounds));
                if failed.get(&index).is_some_and(|count| *count >= CHANCES) {
                    continue;
                }
                match workload.sample(rig, &load) {
                    Ok(values) => {
                        for ((row, unit), value) in workload.rows.iter().zip(values) {
                            self.samples.add(row, unit, name, round, value);
                        }
                    }
                    Err(error) => {
                        check_stop()?;
                        *failed.entry(index).or_default() += 1;
                        let line = format!("{error:#}");
                        meter.note(&format!("FAILED: {line}"));
                        self.failures.push(line);
                    }
                }
            }
        }
        Ok(())
    }

    /// Sets how packets cross the cables, of all rigs alike.
    fn set_wire(&mut self, wire: Wire) -> anyhow::Result<()> {
        if self.wire != wire {
            for rig in &self.rigs {
                rig.set_wire(wire)?;
            }
            self.wire = wire;
            thread::sleep(SETTLE);
        }
        Ok(())
    }

    /// What a workload asks for; half of the kernel's rate is measured now if it has not been.
    fn load(&self, workload: &Workload, pace: Pace, meter: &mut Meter) -> anyhow::Result<Load> {
        let mut load = Load {
            length: pace.length,
            half_rate: 0.0,
        };
        if workload.kind != Kind::Latency {
            return Ok(load);
        }
        let kernel = self
            .rigs
            .iter()
            .find(|rig| self.bases.contains(&rig.mode.name))
            .or(self.rigs.first())
            .context("no mode")?;
        let mut rates: Vec<f64> = self
            .samples
            .of("tcp_rr", kernel.mode.name)
            .iter()
            .flatten()
            .copied()
            .collect();
        if rates.is_empty() {
            meter.stage("finding the rate for half load");
            let probe = crate::workload::ALL[0];
            for _ in 0..3 {
                rates.extend(probe.sample(kernel, &load)?);
            }
        }
        load.half_rate = stats::median(&rates) / 2.0;
        Ok(load)
    }
}
