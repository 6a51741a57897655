# A cluster on Nomad and Consul: nomad job run -var release=0.1.0 deploy/nomad/tandem.nomad.hcl
#
# All tasks use host networking: the engine chooses some of its ports, and NIXL needs the host's network cards.
# Each client has a Consul agent (HTTP on 127.0.0.1:8500, DNS on 127.0.0.1:8600), a host volume `tandem-models` with the
# checkpoint below it, and the Docker driver. Workers on GPUs: -var engine=gpu, with Nomad's NVIDIA device plugin.

variable "datacenters" {
  type    = list(string)
  default = ["*"]
}

variable "release" {
  type    = string
  default = "0.1.0"
}

variable "image_prefix" {
  type        = string
  default     = "tandem/"
  description = "Registry and folder of the images, with the slash at its end."
}

variable "engine" {
  type        = string
  default     = "cpu"
  description = "cpu or gpu: which images the workers have."
}

variable "model" {
  type    = string
  default = "tandem-demo"
}

variable "prefill_count" {
  type    = number
  default = 2
}

variable "decode_count" {
  type    = number
  default = 2
}

job "tandem" {
  datacenters = var.datacenters
  type        = "service"

  # Two, on different hosts, because both use the same well-known port.
  group "registry" {
    count = 2

    network {
      mode = "host"
      port "grpc" { static = 7400 }
      port "metrics" {}
    }

    update {
      max_parallel     = 1
      health_check     = "checks"
      healthy_deadline = "10m"
      auto_revert      = true
    }

    # Restart without limit: a missing dependency may appear later, and the log names it.
    restart {
      attempts = 10
      interval = "5m"
      delay    = "5s"
      mode     = "delay"
    }

    task "registry" {
      driver = "docker"
      user   = "10001:10001"

      # Must exceed drain_settle_s + drain_timeout_s plus the time to stop an engine.
      kill_signal  = "SIGTERM"
      kill_timeout = "60s"

      config {
        image           = "${var.image_prefix}registry:${var.release}"
        network_mode    = "host"
        readonly_rootfs = true
        cap_drop        = ["all"]
        security_opt    = ["no-new-privileges"]
        mount {
          type   = "tmpfs"
          target = "/tmp"
          tmpfs_options {
            size = 268435456
          }
        }
      }

      env {
        TANDEM_REGISTRY_HOST           = "${NOMAD_IP_grpc}"
        TANDEM_REGISTRY_PORT           = "${NOMAD_PORT_grpc}"
        TANDEM_REGISTRY_METRICS_PORT   = "${NOMAD_PORT_metrics}"
        TANDEM_REGISTRY_BACKEND        = "consul"
        TANDEM_REGISTRY_CONSUL_ADDRESS = "127.0.0.1:8500"
      }

      resources {
        cpu    = 500
        memory = 512
      }

      # Used by Nomad for rollouts only. Members are found by the services that the registries register in Consul.
      service {
        name     = "tandem-nomad-registry"
        port     = "grpc"
        provider = "consul"
        check {
          type     = "grpc"
          interval = "5s"
          timeout  = "3s"
        }
      }

      # Found by Prometheus: deploy/observability/prometheus/consul.yml.
      service {
        name     = "tandem-metrics"
        port     = "metrics"
        provider = "consul"
        tags     = ["registry"]
        meta {
          process = "registry-${NOMAD_ALLOC_INDEX}"
          role    = "registry"
        }
      }
    }
  }

  group "frontend" {
    count = 2

    volume "models" {
      type      = "host"
      source    = "tandem-models"
      read_only = true
    }

    network {
      mode = "host"
      port "grpc" {}
      port "metrics" {}
    }

    update {
      max_parallel     = 1
      canary           = 1
      health_check     = "checks"
      healthy_deadline = "10m"
      auto_revert      = true
    }

    # Restart without limit: a missing dependency may appear later, and the log names it.
    restart {
      attempts = 10
      interval = "5m"
      delay    = "5s"
      mode     = "delay"
    }

    task "frontend" {
      driver = "docker"
      user   = "10001:10001"

      # Must exceed drain_settle_s + drain_timeout_s plus the time to stop an engine.
      kill_signal  = "SIGTERM"
      kill_timeout = "60s"

      volume_mount {
        volume      = "models"
        destination = "/models"
        read_only   = true
      }

      config {
        image           = "${var.image_prefix}frontend:${var.release}"
        network_mode    = "host"
        readonly_rootfs = true
        cap_drop        = ["all"]
        security_opt    = ["no-new-privileges"]
        mount {
          type   = "tmpfs"
          target = "/tmp"
          tmpfs_options {
            size = 268435456
          }
        }
      }

      env {
        TANDEM_FRONTEND_HOST         = "${NOMAD_IP_grpc}"
        TANDEM_FRONTEND_PORT         = "${NOMAD_PORT_grpc}"
        TANDEM_FRONTEND_METRICS_PORT = "${NOMAD_PORT_metrics}"
        TANDEM_FRONTEND_REGISTRY     = "srv://registry.tandem.service.consul@127.0.0.1:8600"
        TANDEM_FRONTEND_MODEL        = "/models/${var.model}"
      }

      resources {
        cpu    = 500
        memory = 512
      }

      # Used by Nomad for rollouts only. Members are found by the services that the registries register in Consul.
      service {
        name     = "tandem-nomad-frontend"
        port     = "grpc"
        provider = "consul"
        check {
          type     = "grpc"
          interval = "5s"
          timeout  = "3s"
        }
      }

      # Found by Prometheus: deploy/observability/prometheus/consul.yml.
      service {
        name     = "tandem-metrics"
        port     = "metrics"
        provider = "consul"
        tags     = ["frontend"]
        meta {
          process = "frontend-${NOMAD_ALLOC_INDEX}"
          role    = "frontend"
        }
      }
    }
  }

  group "prefill" {
    count = var.prefill_count

    volume "models" {
      type      = "host"
      source    = "tandem-models"
      read_only = true
    }

    network {
      mode = "host"
      port "grpc" {}
      port "bootstrap" {}
      port "metrics" {}
    }

    update {
      max_parallel     = 1
      health_check     = "checks"
      healthy_deadline = "10m"
      auto_revert      = true
    }

    # Restart without limit: a missing dependency may appear later, and the log names it.
    restart {
      attempts = 10
      interval = "5m"
      delay    = "5s"
      mode     = "delay"
    }

    task "prefill" {
      driver = "docker"
      user   = "10001:10001"

      # Must exceed drain_settle_s + drain_timeout_s plus the time to stop an engine.
      kill_signal  = "SIGTERM"
      kill_timeout = "60s"

      volume_mount {
        volume      = "models"
        destination = "/models"
        read_only   = true
      }

      config {
        image           = "${var.image_prefix}prefill:${var.release}-${var.engine}"
        network_mode    = "host"
        readonly_rootfs = true
        cap_drop        = ["all"]
        security_opt    = ["no-new-privileges"]
        mount {
          type   = "tmpfs"
          target = "/tmp"
          tmpfs_options {
            size = 268435456
          }
        }
        # Between processes of one host: shared memory, and CUDA IPC from GPU to GPU.
        ipc_mode = "host"
        ulimit {
          memlock = "-1:-1"
        }
      }

      env {
        TANDEM_PREFILL_HOST           = "${NOMAD_IP_grpc}"
        TANDEM_PREFILL_PORT           = "${NOMAD_PORT_grpc}"
        TANDEM_PREFILL_METRICS_PORT   = "${NOMAD_PORT_metrics}"
        TANDEM_PREFILL_REGISTRY       = "srv://registry.tandem.service.consul@127.0.0.1:8600"
        TANDEM_PREFILL_WORKER_ID      = "prefill-${NOMAD_ALLOC_INDEX}"
        TANDEM_PREFILL_MODEL          = "/models/${var.model}"
        TANDEM_PREFILL_BOOTSTRAP_PORT = "${NOMAD_PORT_bootstrap}"
        # The first start on a GPU compiles kernels for up to 264 s.
        TANDEM_PREFILL_CANARY_TIMEOUT_S = "300"
      }

      resources {
        cpu    = 2000
        memory = 4096
        dynamic "device" {
          for_each = var.engine == "gpu" ? [1] : []
          labels   = ["nvidia/gpu"]
          content {
            count = 1
          }
        }
      }

      # Used by Nomad for rollouts only. Members are found by the services that the registries register in Consul.
      service {
        name     = "tandem-nomad-prefill"
        port     = "grpc"
        provider = "consul"
        check {
          type     = "grpc"
          interval = "5s"
          timeout  = "3s"
        }
      }

      # Found by Prometheus: deploy/observability/prometheus/consul.yml.
      service {
        name     = "tandem-metrics"
        port     = "metrics"
        provider = "consul"
        tags     = ["prefill"]
        meta {
          process = "prefill-${NOMAD_ALLOC_INDEX}"
          role    = "prefill"
        }
      }
    }
  }

  group "decode" {
    count = var.decode_count

    volume "models" {
      type      = "host"
      source    = "tandem-models"
      read_only = true
    }

    network {
      mode = "host"
      port "grpc" {}
      port "metrics" {}
    }

    update {
      max_parallel     = 1
      health_check     = "checks"
      healthy_deadline = "10m"
      auto_revert      = true
    }

    # Restart without limit: a missing dependency may appear later, and the log names it.
    restart {
      attempts = 10
      interval = "5m"
      delay    = "5s"
      mode     = "delay"
    }

    task "decode" {
      driver = "docker"
      user   = "10001:10001"

      # Must exceed drain_settle_s + drain_timeout_s plus the time to stop an engine.
      kill_signal  = "SIGTERM"
      kill_timeout = "60s"

      volume_mount {
        volume      = "models"
        destination = "/models"
        read_only   = true
      }

      config {
        image           = "${var.image_prefix}decode:${var.release}-${var.engine}"
        network_mode    = "host"
        readonly_rootfs = true
        cap_drop        = ["all"]
        security_opt    = ["no-new-privileges"]
        mount {
          type   = "tmpfs"
          target = "/tmp"
          tmpfs_options {
            size = 268435456
          }
        }
        # Between processes of one host: shared memory, and CUDA IPC from GPU to GPU.
        ipc_mode = "host"
        ulimit {
          memlock = "-1:-1"
        }
      }

      env {
        TANDEM_DECODE_HOST         = "${NOMAD_IP_grpc}"
        TANDEM_DECODE_PORT         = "${NOMAD_PORT_grpc}"
        TANDEM_DECODE_METRICS_PORT = "${NOMAD_PORT_metrics}"
        TANDEM_DECODE_REGISTRY     = "srv://registry.tandem.service.consul@127.0.0.1:8600"
        TANDEM_DECODE_WORKER_ID    = "decode-${NOMAD_ALLOC_INDEX}"
        TANDEM_DECODE_MODEL        = "/models/${var.model}"
        # The first start on a GPU compiles kernels for up to 264 s.
        TANDEM_DECODE_CANARY_TIMEOUT_S = "300"
      }

      resources {
        cpu    = 2000
        memory = 4096
        dynamic "device" {
          for_each = var.engine == "gpu" ? [1] : []
          labels   = ["nvidia/gpu"]
          content {
            count = 1
          }
        }
      }

      # Used by Nomad for rollouts only. Members are found by the services that the registries register in Consul.
      service {
        name     = "tandem-nomad-decode"
        port     = "grpc"
        provider = "consul"
        check {
          type     = "grpc"
          interval = "5s"
          timeout  = "3s"
        }
      }

      # Found by Prometheus: deploy/observability/prometheus/consul.yml.
      service {
        name     = "tandem-metrics"
        port     = "metrics"
        provider = "consul"
        tags     = ["decode"]
        meta {
          process = "decode-${NOMAD_ALLOC_INDEX}"
          role    = "decode"
        }
      }
    }
  }

  group "edge" {
    count = 2

    network {
      mode = "host"
      port "http" { static = 8080 }
      port "metrics" {}
    }

    update {
      max_parallel     = 1
      health_check     = "checks"
      healthy_deadline = "10m"
      auto_revert      = true
    }

    # Restart without limit: a missing dependency may appear later, and the log names it.
    restart {
      attempts = 10
      interval = "5m"
      delay    = "5s"
      mode     = "delay"
    }

    task "edge" {
      driver = "docker"
      user   = "10001:10001"

      # Must exceed drain_settle_s + drain_timeout_s plus the time to stop an engine.
      kill_signal  = "SIGTERM"
      kill_timeout = "60s"

      config {
        image           = "${var.image_prefix}edge:${var.release}"
        network_mode    = "host"
        readonly_rootfs = true
        cap_drop        = ["all"]
        security_opt    = ["no-new-privileges"]
        mount {
          type   = "tmpfs"
          target = "/tmp"
          tmpfs_options {
            size = 268435456
          }
        }
      }

      env {
        TANDEM_EDGE_HOST           = "${NOMAD_IP_http}"
        TANDEM_EDGE_PORT           = "${NOMAD_PORT_http}"
        TANDEM_EDGE_METRICS_PORT   = "${NOMAD_PORT_metrics}"
        TANDEM_EDGE_REGISTRY       = "srv://registry.tandem.service.consul@127.0.0.1:8600"
        TANDEM_EDGE_API_KEYS       = "${NOMAD_SECRETS_DIR}/api-keys"
        TANDEM_EDGE_DRAIN_SETTLE_S = "5"
      }

      # API keys, one line `client-id: key` per client: nomad var put nomad/jobs/tandem/edge/edge api_keys=@FILE
      template {
        destination = "${NOMAD_SECRETS_DIR}/api-keys"
        perms       = "0444"
        change_mode = "noop" # the edge follows the file
        data        = <<-KEYS
        {{ with nomadVar "nomad/jobs/tandem/edge/edge" }}{{ .api_keys }}{{ end }}
        KEYS
      }

      resources {
        cpu    = 500
        memory = 512
      }

      # Used by Nomad for rollouts only. Members are found by the services that the registries register in Consul.
      service {
        name     = "tandem-nomad-edge"
        port     = "http"
        provider = "consul"
        check {
          type     = "http"
          path     = "/healthz"
          interval = "5s"
          timeout  = "3s"
        }
      }

      # Found by Prometheus: deploy/observability/prometheus/consul.yml.
      service {
        name     = "tandem-metrics"
        port     = "metrics"
        provider = "consul"
        tags     = ["edge"]
        meta {
          process = "edge-${NOMAD_ALLOC_INDEX}"
          role    = "edge"
        }
      }
    }
  }
}
