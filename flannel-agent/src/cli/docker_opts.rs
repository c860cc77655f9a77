//! `mk-docker-opts`: what flannel's shell script of that name does, for nodes without a shell.
//!
//! Options are read as `getopts` reads them, so that unit files need only another program name.

use std::{
    collections::BTreeMap,
    ffi::OsString,
    fs,
    net::Ipv4Addr,
    path::{Path, PathBuf},
    process::ExitCode,
};

use flannel_core::subnet_env;
use ipnet::Ipv4Net;

use super::table;
use crate::{files, telemetry::chain};

/// The name of the command.
const NAME: &str = "mk-docker-opts";
/// Variables with this prefix are options.
const PREFIX: &str = "DOCKER_OPT_";
/// Set in the flags of a route through a gateway (kernel: include/uapi/linux/route.h).
const RTF_GATEWAY: u32 = 2;

/// What the command takes.
pub(super) const OPTIONS: &str = "\
Options of the script:
  -f FILE  read this subnet.env [default: /run/flannel/subnet.env]
  -d FILE  write this file [default: /run/docker_opts.env]
  -i       write one variable an option: DOCKER_OPT_BIP, ...
  -c       write one variable with all options; without -i and -c, both
  -k KEY   name of that variable [default: DOCKER_OPTS]
  -m       leave --ip-masq out";

/// The options behind the name of the command, unless it is its help page that is asked for.
pub(super) fn asked_for(arguments: &[OsString]) -> Option<&[OsString]> {
    let (name, options) = arguments.get(1..)?.split_first()?;
    let help = options.iter().any(|option| option == "--help");
    (name == NAME && !help).then_some(options)
}

/// Runs the command.
pub(super) fn main(options: &[OsString]) -> ExitCode {
    let options: Vec<&str> = options.iter().filter_map(|text| text.to_str()).collect();
    let Some(options) = Options::read(&options) else {
        table::complaint(&format!(
            "usage: {NAME} [-f FILE] [-d FILE] [-i] [-c] [-k KEY] [-m]; see {NAME} --help"
        ));
        return ExitCode::FAILURE;
    };
    match options.run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(text) => {
            table::plain_complaint(&text);
            ExitCode::FAILURE
        }
    }
}

/// Variables as a shell has them.
type Variables = BTreeMap<String, String>;

#[derive(Clone, Debug, PartialEq, Eq)]
struct Options {
    flannel_env: PathBuf,
    docker_env: PathBuf,
    individual: bool,
    combined: bool,
    key: String,
    masq: bool,
}

impl Options {
    /// As `getopts "f:d:ick:m"`: letters may stand together, a value may stand behind its letter. `None` is a wrong option.
    fn read(arguments: &[&str]) -> Option<Self> {
        let mut options = Self {
            flannel_env: "/run/flannel/subnet.env".into(),
            docker_env: "/run/docker_opts.env".into(),
            individual: false,
            combined: false,
            key: "DOCKER_OPTS".into(),
            masq: true,
        };
        let mut arguments = arguments.iter();
        while let Some(argument) = arguments.next() {
            let Some(mut letters) = argument.strip_prefix('-').filter(|rest| !rest.is_empty())
            else {
                break;
            };
            if letters == "-" {
                break;
            }
            while let Some(letter) = letters.chars().next() {
                letters = letters.get(letter.len_utf8()..).unwrap_or_default();
                match letter {
                    'i' => options.individual = true,
                    'c' => options.combined = true,
                    'm' => options.masq = false,
                    'f' | 'd' | 'k' => {
                        let value = match std::mem::take(&mut letters) {
                            "" => *arguments.next()?,
                            rest => rest,
                        };
                        match letter {
                            'f' => options.flannel_env = value.into(),
                            'd' => options.docker_env = value.into(),
                            _ => value.clone_into(&mut options.key),
                        }
                    }
                    _ => return None,
                }
            }
        }
        if !options.individual && !options.combined {
            (options.individual, options.combined) = (true, true);
        }
        Some(options)
    }

    fn run(&self) -> Result<(), String> {
        let mut variables: Variables = std::env::vars_os()
            .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
            .collect();
        // A missing file is no error: then Docker has its own subnet.
        if let Ok(text) = fs::read_to_string(&self.flannel_env) {
            variables.extend(subnet_env::assignments(&text));
        }
        write(&self.docker_env, &self.render(&variables)?)?;
        let Some(subnet) = given(&variables, "FLANNEL_SUBNET") else {
            return Ok(());
        };
        let routes = fs::read_to_string("/proc/self/net/route").unwrap_or_default();
        match subnet.parse() {
            Ok(net) if has_gateway(&routes, net) => Err(format!(
                "Your routing table already contains the subnet: {subnet}"
            )),
            _ => Ok(()),
        }
    }

    /// The file's text, from all variables that a shell would have.
    fn render(&self, variables: &Variables) -> Result<String, String> {
        let leads = |c: char| c == '_' || c.is_ascii_alphabetic();
        if !self.key.starts_with(leads) || !is_name(&self.key) {
            return Err(format!("Invalid key: {}", self.key));
        }
        let mut options: Variables = variables
            .iter()
            .filter(|(name, _)| name.starts_with(PREFIX) && is_name(name))
            .map(|(name, value)| (name.clone(), value.clone()))
            .collect();
        let mut set = |name: &str, value: String| options.insert(format!("{PREFIX}{name}"), value);
        if let Some(subnet) = given(variables, "FLANNEL_SUBNET") {
            set("BIP", format!("--bip={subnet}"));
        }
        if let Some(mtu) = given(variables, "FLANNEL_MTU") {
            set("MTU", format!("--mtu={mtu}"));
        }
        // Whoever masquerades, it is only one of the two.
        match given(variables, "FLANNEL_IPMASQ").filter(|_| self.masq) {
            Some("true") => _ = set("IPMASQ", "--ip-masq=false".into()),
            Some("false") => _ = set("IPMASQ", "--ip-masq=true".into()),
            Some(other) => return Err(format!("Invalid value of FLANNEL_IPMASQ: {other}")),
            None => {}
        }
        let mut text = String::new();
        let mut all = variables.get(&self.key).cloned().unwrap_or_default();
        for (name, value) in &options {
            if self.individual {
                text.extend([name, "=\"", value, "\"\n"]);
            }
            all.extend([" ", value]);
        }
        if self.combined {
            text.extend([&self.key, "=\"", &all, "\"\n"]);
        }
        Ok(text)
    }
}

fn given<'a>(variables: &'a Variables, name: &str) -> Option<&'a str> {
    let value = variables.get(name).map(String::as_str);
    value.filter(|value| !value.is_empty())
}

fn is_name(text: &str) -> bool {
    text.chars().all(|c| c == '_' || c.is_ascii_alphanumeric())
}

/// A daemon that starts now reads the old file or the new one; what is no file, such as /dev/stdout, is written to.
fn write(path: &Path, text: &str) -> Result<(), String> {
    let is_file = fs::symlink_metadata(path).is_ok_and(|meta| meta.is_file());
    if is_file || !path.exists() && !path.is_symlink() {
        return files::replace(path, text).map_err(|error| chain(&error));
    }
    fs::write(path, text).map_err(|error| format!("write {}: {error}", path.display()))
}

/// Whether the kernel's table (`/proc/net/route`) sends this subnet through a gateway: then it is another machine's.
fn has_gateway(routes: &str, subnet: Ipv4Net) -> bool {
    routes.lines().any(|line| {
        let columns: Vec<&str> = line.split_whitespace().collect();
        let number = |at: usize| u32::from_str_radix(columns.get(at)?, 16).ok();
        let address = |at| number(at).map(|bits| Ipv4Addr::from(bits.to_ne_bytes()));
        address(1) == Some(subnet.network())
            && address(7) == Some(subnet.netmask())
            && number(3).is_some_and(|flags| flags & RTF_GATEWAY != 0)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_read_as_getopts_reads_them() {
        let read = |arguments: &[&str]| Options::read(arguments);
        let spread = read(&["-f", "/a", "-d", "/b", "-i", "-c", "-k", "K", "-m"]);
        assert_eq!(spread, read(&["-icmf/a", "-d/b", "-kK"]));
        let spread = spread.expect("options");
        assert_eq!(
            (spread.flannel_env, spread.docker_env, spread.key),
            ("/a".into(), "/b".into(), "K".to_owned())
        );
        assert!(spread.individual && spread.combined && !spread.masq);
        let none = read(&[]).expect("options");
        assert!(none.individual && none.combined && none.masq);
        assert_eq!(read(&["--", "-x"]), Some(none.clone()));
        assert_eq!(read(&["word", "-x"]), Some(none));
        assert!(!read(&["-i"]).expect("options").combined);
        for wrong in [
            &["-x"][..],
            &["-h"],
            &["-?"],
            &["-k"],
            &["-if"],
            &["-i", "-é"],
        ] {
            assert_eq!(read(wrong), None, "{wrong:?}");
        }
    }

    #[test]
    fn only_a_gateway_to_this_very_subnet_counts() {
        let routes = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\n\
                      eth0\t00000000\t014DA8C0\t0003\t0\t0\t0\t00000000\n\
                      eth0\t004A010A\t014DA8C0\t0003\t0\t0\t0\t00FFFFFF\n\
                      cni0\t004B010A\t00000000\t0001\t0\t0\t0\t00FFFFFF\n";
        let is = |text: &str| has_gateway(routes, text.parse().expect("a subnet"));
        assert!(is("10.1.74.1/24"));
        assert!(!is("10.1.74.1/25"));
        assert!(!is("10.1.75.1/24"));
        assert!(!is("10.1.76.1/24"));
    }
}
