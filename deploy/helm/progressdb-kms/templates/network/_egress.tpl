{{/* An egress rule: (dict "to" [peers] "ports" [numbers]). Without `to` any address on these ports. */}}
{{- define "progressdb-kms.egressTo" -}}
- ports:
    {{- range .ports }}
    - {port: {{ int . }}, protocol: TCP}
    {{- end }}
  {{- with .to }}
  to:
    {{- toYaml . | nindent 4 }}
  {{- end }}
{{- end }}

{{- define "progressdb-kms.cidrs" -}}
{{- $peers := list -}}
{{- range . }}{{ $peers = append $peers (dict "ipBlock" (dict "cidr" .)) }}{{ end }}
{{- toJson $peers -}}
{{- end }}

{{- define "progressdb-kms.egressDns" -}}
{{- with .Values.networkPolicy.dns -}}
- ports:
    {{- range .ports }}
    - {port: {{ int . }}, protocol: UDP}
    - {port: {{ int . }}, protocol: TCP}
    {{- end }}
  to:
    - namespaceSelector: {matchLabels: {{ toJson .namespaceLabels }}}
      podSelector: {matchLabels: {{ toJson .podLabels }}}
    {{- range .cidrs }}
    - ipBlock: {cidr: {{ . }}}
    {{- end }}
{{- end }}
{{- end }}

{{- define "progressdb-kms.egressStore" -}}
{{- if .Values.redis.enabled -}}
- ports: [{port: 6379, protocol: TCP}]
  to: [{podSelector: {matchLabels: {{ toJson (set (include "progressdb-kms.selectorLabels" . | fromYaml) "app.kubernetes.io/component" "redis") }}}}]
{{- else -}}
{{ include "progressdb-kms.egressTo" (dict "to" .Values.externalStore.networkPolicyTo "ports" .Values.externalStore.ports) }}
{{- end }}
{{- end }}
