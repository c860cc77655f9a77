{{/* Labels of every object. */}}
{{- define "flannel-ebpf.labels" -}}
k8s-app: flannel
app.kubernetes.io/name: flannel-ebpf
app.kubernetes.io/part-of: flannel-ebpf
{{- end -}}

{{/* Labels of the DaemonSet and of its pods. */}}
{{- define "flannel-ebpf.podLabels" -}}
app: flannel
tier: node
{{ include "flannel-ebpf.labels" . }}
app.kubernetes.io/component: node-agent
app.kubernetes.io/version: {{ .Chart.AppVersion }}
{{- end -}}

{{/* The image with everything in it. */}}
{{- define "flannel-ebpf.image" -}}
{{- if .Values.flannel.image.tag -}}
{{ .Values.flannel.image.repository }}:{{ .Values.flannel.image.tag }}
{{- else -}}
{{ .Values.flannel.image.repository }}:{{ .Chart.AppVersion }}
{{- end -}}
{{- end -}}

{{/* Another image for the CNI plugin, if there is one. */}}
{{- define "flannel-ebpf.pluginImage" -}}
{{- if .Values.flannel.image_cni.repository -}}
{{ .Values.flannel.image_cni.repository }}:{{ .Values.flannel.image_cni.tag }}
{{- else if .Values.flannel.flannel_cni.image.repository -}}
{{ .Values.flannel.flannel_cni.image.repository }}:{{ .Values.flannel.flannel_cni.image.tag }}
{{- end -}}
{{- end -}}

{{/* Ends the rendering for what the agent would not do. */}}
{{- define "flannel-ebpf.check" -}}
{{- if ne .Values.flannel.backend "vxlan" -}}
{{- if ne .Values.flannel.backend "host-gw" -}}
{{- if ne .Values.flannel.backend "wireguard" -}}
{{- if ne .Values.flannel.backend "alloc" -}}
{{- fail (printf "flannel.backend=%s: use vxlan, host-gw, wireguard or alloc; stay with flannel for others" .Values.flannel.backend) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if .Values.flannel.directRouting -}}
{{- fail (printf "flannel.directRouting is of the backend vxlan, and flannel.backend is %s" .Values.flannel.backend) -}}
{{- end -}}
{{- end -}}
{{- if not (or .Values.podCidr .Values.podCidrv6) -}}
{{- fail "podCidr and podCidrv6 are empty: the agent needs the network of all pods, of one family or of both" -}}
{{- end -}}
{{- if .Values.flannel.macPrefix -}}
{{- fail "flannel.macPrefix is for Windows nodes, which this agent does not serve" -}}
{{- end -}}
{{- if ne .Values.flannel.backend "wireguard" -}}
{{- if or .Values.flannel.psk .Values.flannel.tunnelMode .Values.flannel.keepaliveInterval .Values.flannel.backendPortv6 -}}
{{- fail (printf "flannel.psk, tunnelMode, keepaliveInterval and backendPortv6 are of the backend wireguard, and flannel.backend is %s" .Values.flannel.backend) -}}
{{- end -}}
{{- end -}}
{{- if .Values.netpol.enabled -}}
{{- fail "netpol.enabled: network policies are not part of this chart; install kube-network-policies by its own manifest" -}}
{{- end -}}
{{- end -}}
