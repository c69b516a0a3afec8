{{- define "memory-nodes.labels" -}}
{{ include "memory-nodes.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/component: memory-node
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{- define "memory-nodes.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{/* Metadata of an object. Takes the context, what follows its name, and labels. */}}
{{- define "memory-nodes.metadata" -}}
name: {{ .root.Release.Name }}{{ .suffix }}
namespace: {{ .root.Release.Namespace }}
labels:
  {{- include "memory-nodes.labels" .root | nindent 2 }}
  {{- with .labels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end }}

{{- define "memory-nodes.tokenSecret" -}}
{{- $auth := .Values.auth }}
{{- $given := len (compact (list $auth.existingSecret $auth.token (ternary "insecure" "" $auth.insecure))) }}
{{- if ne $given 1 }}
{{- fail (printf "auth has %d of existingSecret, token and insecure. Allowed: one of them. Make a Secret with: kubectl create secret generic attn-offload-token --from-literal=token=\"$(openssl rand -hex 32)\" and set auth.existingSecret=attn-offload-token" $given) }}
{{- end }}
{{- if $auth.token }}{{ .Release.Name }}-token{{ else }}{{ $auth.existingSecret }}{{ end }}
{{- end }}

{{- define "memory-nodes.tlsSecret" -}}
{{- $tls := .Values.tls }}
{{- if and $tls.existingSecret $tls.certManager.enabled }}
{{- fail "tls has existingSecret and certManager.enabled. Allowed: one of them, or none for plain TCP. Leave one out." }}
{{- end }}
{{- if and $tls.certManager.enabled (not $tls.certManager.issuerRef.name) }}
{{- fail "tls.certManager.enabled has no issuerRef.name. Allowed: the name of an Issuer, or of a ClusterIssuer with issuerRef.kind. Set tls.certManager.issuerRef.name." }}
{{- end }}
{{- if $tls.certManager.enabled }}{{ .Release.Name }}-tls{{ else }}{{ $tls.existingSecret }}{{ end }}
{{- end }}

{{/* Address of a node in every namespace. Takes the context and the ordinal. */}}
{{- define "memory-nodes.address" -}}
{{- with .root }}{{ .Release.Name }}-{{ $.ordinal }}.{{ .Release.Name }}.{{ .Release.Namespace }}:{{ .Values.port }}{{ end }}
{{- end }}
