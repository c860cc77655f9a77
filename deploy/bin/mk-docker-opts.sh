#!/bin/sh
# Turns flannel's subnet.env into options for the Docker daemon, for units that read an EnvironmentFile.
# `flannel-agent mk-docker-opts` is the same without a shell.

usage() {
	cat >&2 <<EOF
usage: $0 [-f FILE] [-d FILE] [-i] [-c] [-k KEY] [-m]

Writes options for the Docker daemon that fit this node's flannel subnet.

	-f FILE	read this subnet.env; default /run/flannel/subnet.env
	-d FILE	write this file; default /run/docker_opts.env
	-i	write one variable an option: DOCKER_OPT_BIP, DOCKER_OPT_IPMASQ, DOCKER_OPT_MTU
	-c	write one variable with all options; without -i and -c, both
	-k KEY	name of that variable; default DOCKER_OPTS
	-m	leave --ip-masq out
EOF
	exit 1
}

flannel_env=/run/flannel/subnet.env
docker_env=/run/docker_opts.env
key=DOCKER_OPTS
individual=
combined=
with_masq=yes

while getopts "f:d:ick:mh?" option; do
	case $option in
	f) flannel_env=$OPTARG ;;
	d) docker_env=$OPTARG ;;
	i) individual=yes ;;
	c) combined=yes ;;
	k) key=$OPTARG ;;
	m) with_masq= ;;
	*) usage ;;
	esac
done
if [ -z "$individual$combined" ]; then
	individual=yes
	combined=yes
fi
case $key in
'' | [0-9]* | *[!A-Za-z0-9_]*)
	echo "Invalid key: $key" >&2
	exit 1
	;;
esac

# The name of a file to be sourced is looked up in PATH unless it has a slash.
case $flannel_env in
*/*) ;;
*) flannel_env=./$flannel_env ;;
esac
if [ -f "$flannel_env" ]; then
	. "$flannel_env"
fi

if [ -n "$FLANNEL_SUBNET" ]; then
	DOCKER_OPT_BIP="--bip=$FLANNEL_SUBNET"
fi
if [ -n "$FLANNEL_MTU" ]; then
	DOCKER_OPT_MTU="--mtu=$FLANNEL_MTU"
fi
# Whoever masquerades, it is only one of the two.
if [ -n "$with_masq" ]; then
	case $FLANNEL_IPMASQ in
	'') ;;
	true) DOCKER_OPT_IPMASQ="--ip-masq=false" ;;
	false) DOCKER_OPT_IPMASQ="--ip-masq=true" ;;
	*)
		echo "Invalid value of FLANNEL_IPMASQ: $FLANNEL_IPMASQ" >&2
		exit 1
		;;
	esac
fi

# All variables of that prefix, those of the environment too, in the order of their names.
names=$(set | LC_ALL=C sed -n 's/^\(DOCKER_OPT_[A-Za-z0-9_]*\)=.*/\1/p' | LC_ALL=C sort -u)
eval "options=\$$key"
text=
for name in $names; do
	# A line in another variable's value can look like one, too.
	eval "present=\${$name+yes} value=\$$name"
	[ -n "$present" ] || continue
	if [ -n "$individual" ]; then
		text="$text$name=\"$value\"
"
	fi
	options="$options $value"
done
if [ -n "$combined" ]; then
	text="$text$key=\"$options\"
"
fi

mkdir -p -- "$(dirname -- "$docker_env")" || exit 1
if [ -L "$docker_env" ] || { [ -e "$docker_env" ] && [ ! -f "$docker_env" ]; }; then
	# Such as /dev/stdout.
	printf '%s' "$text" >"$docker_env" || exit 1
else
	# Renamed into place: a daemon that starts now reads the old file or the new one.
	scratch=$docker_env.$$
	if ! printf '%s' "$text" >"$scratch" || ! mv -f -- "$scratch" "$docker_env"; then
		rm -f -- "$scratch"
		exit 1
	fi
fi

# A subnet that is reached through a gateway is another machine's: docker0 would take its packets.
if [ -n "$FLANNEL_SUBNET" ] && command -v ip >/dev/null 2>&1; then
	if ip -4 route show | awk -v subnet="$FLANNEL_SUBNET" '
		BEGIN {
			split(subnet, half, "/")
			split(half[1], byte, ".")
			left = half[2]
			for (i = 1; i <= 4; i++) {
				bits = left > 8 ? 8 : (left < 0 ? 0 : left)
				left -= 8
				size = 2 ^ (8 - bits)
				network = network (i > 1 ? "." : "") (byte[i] - byte[i] % size)
			}
			network = network "/" half[2]
		}
		$1 == network && $2 == "via" { found = 1 }
		END { exit !found }
	'; then
		echo "Your routing table already contains the subnet: $FLANNEL_SUBNET" >&2
		exit 1
	fi
fi
